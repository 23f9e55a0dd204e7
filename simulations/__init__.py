"""Many nodes on one machine in virtual time: the same cores, real frames, wires and disasters made by a seed."""
