"""What can go wrong, by who can do something about it. Lowest level: imports nothing of ours.

Every message names the field, its value, the rule and, if there is one, the way out; lower-case, no full stop.
"""


class LmiError(Exception):
    """Base of all errors that lmi-dist raises on purpose; `code` is the HTTP-like status of the DJL contract."""

    code = 424


class ConfigError(LmiError, ValueError):
    """A setting or a model's config.json breaks a rule; nothing was started."""


class CheckpointError(LmiError):
    """The model's files are missing, corrupt or not what config.json promises."""


class RequestError(LmiError, ValueError):
    """One request breaks a rule; `field` is the parameter at fault. Nobody else is touched."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class OverloadedError(LmiError):
    """There is no room for one more request now; the caller may try again later."""

    code = 503


class MemoryPlanError(LmiError):
    """The weights or the KV pool do not fit; the message holds the arithmetic."""

    code = 507


class StepError(LmiError):
    """A forward failed; the requests of that step end with this, the engine goes on."""


class LostRankError(StepError):
    """A forward failed because another rank has ended. No other will work: the ranks have to be replaced, then try again."""

    code = 503


class RankError(LmiError):
    """Another rank of the model has ended, or could not go on with the step."""


class DeviceError(LmiError):
    """A GPU fails every call from now on in this process, which must end; a new one may find it well."""


class KernelError(LmiError):
    """A kernel refused its arguments or failed: a promise of ours was broken."""
