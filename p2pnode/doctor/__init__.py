"""Why nodes do or don't meet: checks that look at one thing each and say what they found in plain sentences.

Owns the checks and their sentences; `examination.py` runs them. Never changes anything: no key is drawn, no folder made, no peer
kept. A check that can't tell says "unknown" and never guesses. A new check is a function that returns findings, in the file of
its group, called in `examination.py`.

Idea: `brew doctor`, `flutter doctor`: a line for each finding, and what to do next.
"""
