"""The shipped recipes, and what is checked of them."""

from launcher.check.command import GROUPS, WAYS

__all__ = ["SHIPPED"]

# compiling takes longer than all the rest: that is by hand
QUICK = ",".join([*GROUPS[1:], *(way for way in WAYS if way != "compiled")])
NAMES = ("gpt", "classify", "finetune")
SHIPPED = {f"{name}, quickly": (name, QUICK) for name in NAMES} | {name: (name, None) for name in NAMES}
