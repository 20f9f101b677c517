"""The on-disk format, versions 1 and 2 (docs/FORMAT.md is normative): write, open lazily, verify, describe.

files.py      bounded reads, safe names, sha256, MANIFEST.json
format.py     what stands in a checkpoint: config keys, tensor names, shapes, dtypes, allowed values
writing.py    module_tensors, quantization_config, write
opening.py    what headers and JSON tell: files, planes, shapes
reading.py    Checkpoint: headers first, tensors on demand
choosing.py   which widths to read and to hold
checking.py   verify and describe
"""

from matquant.checkpoint.checking import Description, describe, verify
from matquant.checkpoint.choosing import choose
from matquant.checkpoint.reading import Checkpoint, nested_weight
from matquant.checkpoint.writing import add_files, module_tensors, quantization_config, write, writing_error

__all__ = [
    "Checkpoint",
    "Description",
    "add_files",
    "choose",
    "describe",
    "module_tensors",
    "nested_weight",
    "quantization_config",
    "verify",
    "write",
    "writing_error",
]
