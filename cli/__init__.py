"""What a user types. One file a group of verbs; `render.py` shows, `exit_status.py` names how a command may end.

Nothing here decides anything about learning: verbs read flags, call `p2pnode` (or, from `simulate.py` alone,
`simulations`) and show what came back. No module here may import torch or libp2p when it is imported: `p2pnode status`
answers at once on the smallest machine. `tests/test_tidy.py` holds both.
"""
