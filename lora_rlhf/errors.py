"""What can be the user's mistake. Everything else is a bug and keeps its traceback."""


class UserError(Exception):
    """A mistake its message can mend: where, what was found, what is allowed, what to do.

    The command line prints the message without a traceback and exits with status 2.
    """


class ConfigError(UserError):
    """A recipe, an override or a command-line argument that cannot be used as it stands."""


class DataError(UserError):
    """A data file that cannot be read or holds rows that cannot be used."""


class CheckpointError(UserError):
    """A run directory, adapter or checkpoint that is missing, damaged or made for another base."""


class HardwareError(UserError):
    """The machine cannot do what the recipe asks: no memory, no device, no kernel."""


class TrainingError(UserError):
    """A run that stopped itself: a loss that is not finite, a KL that ran away."""


class PreferenceError(UserError):
    """A store of preferences that cannot be opened, read or written."""


class EventRefused(PreferenceError):
    """An event that the store does not take: a vote twice, on nothing, or on somebody's task."""
