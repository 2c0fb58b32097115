"""One request to the API on its way: n jobs of the engine, whose ids become text in the event loop's thread."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator

from nanochat_jax.engine import engine
from server.choice import Choice, Shown
from server.errors import ApiError
from server.metrics import Metrics
from server.scheduler import Scheduler, Update
from server.schemas import Sampling

NO_MASS = 1e-9  # what top_p=0 stands for: the likeliest alone
SILENCE = 5.0  # seconds, after which a stream says that it lives


def engine_requests(tok, prompts: list[list[int]], body: Sampling, grammar, machine) -> list[engine.Request]:
    """n requests for each prompt, with seeds that count up from the one that was given."""
    seed = random.randrange(2**31) if body.seed is None else body.seed
    how: dict = {"temperature": body.temperature, "top_k": body.top_k, "logprobs": body.wanted_logprobs}
    how |= {"top_p": body.top_p or NO_MASS, "shaping": body.shaping, "grammar": grammar, "tool": machine}
    if body.shaping and (unknown := [id for id, _ in body.shaping.bias if id >= tok.vocab_size]):
        raise ApiError(400, f"logit_bias: ids go up to {tok.vocab_size - 1}, and {unknown[0]} is beyond", "logit_bias")
    stops = (tok.assistant_end, tok.bos)
    seeds = range(seed, seed + (body.n or 1))
    return [engine.Request(ids, body.limit, seed=s, stop_ids=stops, **how) for ids in prompts for s in seeds]


class Answer:
    """Submits the requests for some prompts, all or none: Busy where there is no room for them, Stopped where the
    engine is down. grammar: what the answers keep to, machine: what answers their calls, in place of the engine's; or
    None.

    The caller must `close` it, which frees the slots of what has not ended.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        tok,
        prompts: list[list[int]],
        body: Sampling,
        metrics: Metrics,
        grammar=None,
        machine=None,
    ):
        requests, stops = engine_requests(tok, prompts, body, grammar, machine), body.stops
        self.choices = [Choice(tok, stops, trimmed=machine is not None) for _ in requests]
        self._scheduler, self._metrics, self._began = scheduler, metrics, time.perf_counter()
        self._n_prompt, self._first = sum(map(len, prompts)), True
        loop = asyncio.get_running_loop()
        self._updates: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()

        def deliver(index: int, update: Update) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(self._updates.put_nowait, (index, update))

        self._jobs = scheduler.submit(requests, deliver)

    @property
    def ended(self) -> bool:
        return all(choice.reason is not None for choice in self.choices)

    async def shown(self) -> AsyncGenerator[tuple[int, list[Shown]]]:
        """(index of a choice, what may be shown of it now) as it is made; the last of a choice has its `reason` set.
        Nothing is shown of choice 0 now and then while nothing comes.

        Raises Stopped where the engine fails, ApiError where the answer cannot be made.
        """
        while not self.ended:
            try:
                index, update = await asyncio.wait_for(self._updates.get(), SILENCE)
            except TimeoutError:
                yield 0, []
                continue
            choice = self.choices[index]
            if choice.reason is not None:
                continue
            if isinstance(update, Exception):
                raise update
            if self._first and update.ids:
                self._first = False
                self._metrics.first_token.observe(time.perf_counter() - self._began)
            parts = choice.push(update.ids, update.logprobs)
            if update.completion is not None:
                reason = update.completion.finish_reason
                if reason not in ("stop", "length", "cancelled"):
                    raise ApiError(400, f"the answer cannot be kept to the form that was asked for: {reason}")
                parts += choice.finish(reason)
            elif choice.reason is not None:  # a stop string: the engine need not go on
                self._scheduler.cancel(self._jobs[index])
            if parts or choice.reason is not None:
                yield index, parts

    def close(self) -> None:
        for choice, job in zip(self.choices, self._jobs):
            if choice.reason is None:
                self._scheduler.cancel(job)

    def usage(self) -> dict:
        made, thoughts = (sum(getattr(c, n) for c in self.choices) for n in ("n_ids", "n_thoughts"))
        told = {"prompt_tokens": self._n_prompt, "completion_tokens": made, "total_tokens": self._n_prompt + made}
        return told | ({"completion_tokens_details": {"reasoning_tokens": thoughts}} if thoughts else {})
