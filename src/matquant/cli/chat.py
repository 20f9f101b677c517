"""`matquant chat`: a conversation on the terminal, or of lines from a pipe.

The cache is kept from turn to turn: the whole conversation is written out by the tokenizer's chat template, and of its tokens those pass that
differ from what has passed already, which are the new ones.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import typer

from matquant.cli.options import BITS, DRAFT, HEAD, PLAN, SOURCE, THREADS
from matquant.errors import InputError, MatquantError, RecipeError

if TYPE_CHECKING:
    from matquant.cli.writing import How
    from matquant.engine import Session

COMMANDS = "/bits N  /draft N (0: none)  /reset  /stats  /quit; Ctrl-C stops a reply"


def chat(
    folder: str = SOURCE,
    bits: int | None = BITS,
    plan: str | None = PLAN,
    draft_bits: int | None = DRAFT,
    system: str | None = typer.Option(None, metavar="TEXT", help="what the system says first", show_default=False),
    max_new_tokens: int = typer.Option(512, min=1, help="tokens of a reply at most"),
    temperature: float = typer.Option(0.7, min=0.0, help="0 = greedy"),
    seed: int = typer.Option(0, help="of sampling"),
    threads: int | None = THREADS,
    head_bits: int | None = HEAD,
) -> None:
    """Talk with a model, at widths that may change from turn to turn."""
    from matquant.cli import run, show, writing

    where = writing.Where(folder, writing.width(bits, plan), draft_bits, "cpu", "float32", threads, head_bits)
    engine = writing.open_engine(where, keep_all=True)
    tokenizer = run.load_tokenizer(str(engine.checkpoint.folder))
    how = writing.How(max_new_tokens, temperature, seed)
    Chat(engine.session(), tokenizer, how, show.Stream(always=True), draft_bits, system).run()


@dataclass
class Chat:
    """tell: takes text as it comes. messages: of the conversation, as chat templates take them."""

    session: "Session"
    tokenizer: Any
    how: "How"
    tell: Callable[[str], None]
    draft: int | None = None
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    turns: int = 0
    last: tuple[int, int, float] = (0, 0, 0.0)  # of the last reply: tokens that passed before it, its own, seconds

    def run(self) -> None:
        """Until /quit or the end of the input."""
        if self.templated:
            sys.stderr.write(f"{COMMANDS}\n")
        else:
            sys.stderr.write(f"this model has no chat template: it continues the text plainly. {COMMANDS}\n")
        self.reset()
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                return
            except KeyboardInterrupt:
                self.tell("\n(/quit ends)\n")
                continue
            if line.strip() == "/quit":
                return
            try:
                self.command(line.split()) if line.startswith("/") else self.turn(line)
            except KeyboardInterrupt:  # outside of the reply itself
                self.tell("\n")
            except MatquantError as error:
                sys.stderr.write(f"error: {error}\n")

    @property
    def templated(self) -> bool:
        return getattr(self.tokenizer, "chat_template", None) is not None

    def reset(self) -> None:
        """Forget the conversation."""
        self.session.rewind([])
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    # --- turns ------------------------------------------------------------------------------------------------------

    def turn(self, text: str) -> None:
        """Say `text` and let the model reply. A reply that Ctrl-C stops stays as far as it came. Raises InputError where there is no room."""
        from matquant.cli.writing import Words

        if not text.strip():
            return
        session, said = self.session, {"role": "user", "content": text}
        ids = self._tokens(said)
        if (room := session.cache.capacity - len(session.ids) - len(ids)) < 1:
            raise InputError(
                f"the conversation would have {len(session.ids) + len(ids)} tokens, and there is room for {session.cache.capacity}; /reset it"
            )
        self.messages.append(said)
        words, behind, started = Words(self.tokenizer), len(session.ids) + len(ids) - session.passed, time.perf_counter()
        try:
            for token in session.reply(
                ids, min(self.how.new, room), self.how.temperature, self.how.seed + self.turns, self.draft, session.engine.stop
            ):
                self.tell(words.add(token))
            self.tell(words.rest() + "\n")
        except KeyboardInterrupt:
            self.tell(" (stopped)\n")
        self.turns += 1
        self.last = behind, len(words.ids), time.perf_counter() - started
        self.messages.append({"role": "assistant", "content": self.tokenizer.decode(words.ids, skip_special_tokens=True)})

    def _tokens(self, said: dict[str, str]) -> list[int]:
        """What is to follow the text in the session, which goes back to where the conversation differs from it."""
        if not self.templated:
            return list(self.tokenizer(said["content"], add_special_tokens=not self.session.ids).input_ids)
        whole = self.tokenizer.apply_chat_template([*self.messages, said], add_generation_prompt=True, return_dict=False)
        return self.session.rewind(whole)

    # --- commands ---------------------------------------------------------------------------------------------------

    def command(self, words: list[str]) -> None:
        """Raises RecipeError for one that there is not."""
        match words:
            case ["/bits", number]:
                self.set_bits(_number("/bits", number))
            case ["/draft", number]:
                self.set_draft(_number("/draft", number))
            case ["/reset"]:
                self.reset()
            case ["/stats"]:
                self.tell(self.stats())
            case _:
                raise RecipeError(f"no command {' '.join(words)!r}; there are {COMMANDS}")

    def set_bits(self, bits: int) -> None:
        """From the next token on; a draft that is not narrower ends."""
        self.session.engine.set_bits(bits)
        if self.draft is not None and self.draft >= bits:
            self.draft = None
            sys.stderr.write("no drafts any more: they were not narrower\n")

    def set_draft(self, bits: int) -> None:
        from matquant.cli.writing import check_draft

        check_draft(bits or None, self.session.engine.plan, self.session.engine.checkpoint.widths)
        self.draft = bits or None

    def stats(self) -> str:
        """The state and the last reply, in words."""
        from matquant.cli.show import drafting

        engine, (behind, made, seconds) = self.session.engine, self.last
        lines = [
            f"{engine.plan.label} bits, {len(self.session.ids)} tokens of at most {self.session.cache.capacity}",
            f"last reply: {behind} tokens read, {made} written, {made / seconds if seconds else 0:.1f} tokens/s",
        ]
        if self.draft is not None:
            done = engine.speculation
            lines.append(drafting(self.draft, done.acceptance, done.repeated, done.per_pass))
        return "".join(f"{line}\n" for line in lines)


def _number(command: str, text: str) -> int:
    if not text.isdigit():
        raise RecipeError(f"{command} takes a whole number of bits, not {text!r}")
    return int(text)
