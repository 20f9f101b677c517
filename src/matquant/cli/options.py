"""Arguments and flags that several commands share."""

import typer

FOLDER = typer.Argument(..., metavar="DIR", help="a matquant checkpoint", show_default=False)
SOURCE = typer.Argument(..., metavar="DIR", help="a matquant checkpoint: a folder, or a Hugging Face id", show_default=False)
JSON = typer.Option(False, "--json", help="print JSON for machines on stdout, and nothing else")
DEVICE = typer.Option("cpu", metavar="DEVICE", help="where to compute, for instance cpu or cuda:0")
DTYPE = typer.Option("float32", metavar="DTYPE", help="type of activations: float32, bfloat16 or float16")
REMOTE = typer.Option(False, "--trust-remote-code", help="run the model's own Python code; read it first")
GGUF = typer.Option(None, "--gguf-file", metavar="NAME", help="name of a GGUF file inside the model's folder", show_default=False)
PLAN_HELP = "a plan of the checkpoint by name, a plan file, or bits a weight such as 3.5: the best plan of that size, if matquant plan has measured"
PLAN = typer.Option(None, "--plan", metavar="PLAN", help=PLAN_HELP, show_default=False)
PLANS = typer.Option(None, "--plan", metavar="PLAN", help=PLAN_HELP + "; may be given again", show_default=False)
BITS = typer.Option(None, help="read width", show_default="the checkpoint's")
DRAFT = typer.Option(None, "--draft-bits", help="self-speculation: draft at this width, verify at the one that is read", show_default=False)
THREADS = typer.Option(None, min=1, help="threads to compute with", show_default="torch's: OMP_NUM_THREADS, or one a core")
HEAD_HELP = "of a head that is not quantized: rounded to this width when it is loaded (engine)"
HEAD = typer.Option(None, "--head-bits", min=2, max=8, help=HEAD_HELP, show_default="8, or the width that it is stored in")
