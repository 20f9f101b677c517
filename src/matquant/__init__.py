"""matquant: quantize an LLM once into one nested integer checkpoint, read it at 8, 6, 4, 3 or 2 bits.

Importing this package initialises nothing. It registers the checkpoint format with transformers as soon as (and only if)
transformers' quantizers are imported, so that a plain `AutoModelForCausalLM.from_pretrained(folder)` works.
"""
