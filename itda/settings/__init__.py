"""Settings: `groups` declares each once, `verbs` says who takes which, `declare` is how functions come to have them.

May use errors alone; everything else may use it. In Python settings are flat keywords, on the command line flags.
"""

from itda.settings.declare import Declared, Setting, Verb, kept, names, pick, takes

__all__ = ["Declared", "Setting", "Verb", "kept", "names", "pick", "takes"]
