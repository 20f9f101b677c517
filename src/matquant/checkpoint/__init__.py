"""The on-disk format, version 1 (docs/FORMAT.md is normative): write, open lazily, verify, describe.

files.py      bounded reads, safe names, sha256, MANIFEST.json
format.py     what stands in a version 1 checkpoint: config keys, tensor names, shapes, dtypes, allowed values
writing.py    module_tensors, quantization_config, write
reading.py    Checkpoint: headers first, tensors on demand
checking.py   verify and describe
"""

from matquant.checkpoint.checking import Description, describe, verify
from matquant.checkpoint.reading import Checkpoint
from matquant.checkpoint.writing import module_tensors, quantization_config, write

__all__ = ["Checkpoint", "Description", "describe", "module_tensors", "quantization_config", "verify", "write"]
