"""Who may ask: keys, and what each may use.

Only a key's SHA-256 stands in the file. A key is 32 random bytes, which no list of guesses holds, so its hash needs
neither salt nor a slow function. All hashes are compared whatever came, each in constant time: what is answered, and
when, is the same for no key and for a wrong one.
"""

import hmac
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import translate
from time import monotonic

from topwork.serving.config import TenantConfig
from topwork.serving.errors import ApiError
from topwork.serving.keys import digest
from topwork.serving.limits import Allowance
from topwork.serving.seams import Call, Caller


class Tenants:
    """`seams.Gate` for a server with keys."""

    def __init__(self, configs: Sequence[TenantConfig], clock: Callable[[], float] = monotonic) -> None:
        self._configs = {config.name: config for config in configs}
        self._allowances = {config.name: Allowance(config, clock) for config in configs}
        self._models = {config.name: _any_of(config.models) for config in configs}
        self._keys = [(bytes.fromhex(key), _caller(config)) for config in configs for key in config.key_sha256]
        self._inside: dict[str, tuple[Allowance, int]] = {}

    def identify(self, headers: Mapping[str, str]) -> Caller:
        """Who asks, by `authorization: Bearer KEY`. Raises ApiError (401)."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = digest(key.strip())
        found = None
        for known, caller in self._keys:
            if hmac.compare_digest(known, given):
                found = caller
        if found is None or scheme.lower() != "bearer":
            raise ApiError(
                401, "no key that this server knows came with the request; send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
            )  # fmt: skip
        return found

    def may_use(self, caller: Caller, name: str) -> bool:
        """Whether one of the tenant's patterns fits the name; an admin may all."""
        return caller.admin or bool(self._models[caller.name].fullmatch(name))

    def may_read_metrics(self, caller: Caller) -> bool:
        """An admin, and who was given leave."""
        return caller.admin or self._configs[caller.name].metrics

    def enter(self, call: Call) -> None:
        """Raises LimitReached."""
        allowance = self._allowances[call.caller.name]
        allowance.enter(call.prompt_tokens)
        self._inside[call.id] = allowance, call.prompt_tokens

    def leave(self, call: Call) -> None:
        """A call that has left already, or never entered, changes nothing. A prompt whose tokens were not known at the
        entrance is paid now."""
        if call.id in self._inside:
            allowance, paid = self._inside.pop(call.id)
            allowance.leave(call.prompt_tokens - paid + call.generated_tokens)

    def headers(self, caller: Caller) -> dict[str, str]:
        """x-ratelimit-…: what a tenant with limits is told with every answer."""
        return self._allowances[caller.name].headers()


def _caller(config: TenantConfig) -> Caller:
    salt = f"tenant/{config.name}" if config.shared_prompts is None else f"shared/{config.shared_prompts}"
    return Caller(config.name, config.admin, salt, config.name)


def _any_of(patterns: Sequence[str]) -> re.Pattern[str]:
    """`*` and `?` as a shell has them; nothing where there are none."""
    return re.compile("|".join(translate(pattern) for pattern in patterns) or r"(?!)")
