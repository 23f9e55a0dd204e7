"""How fast, how large, how idle: measurements that anybody can repeat with `p2pnode bench`.

Owns the processes that a measurement starts and the documents it gives. Must never be imported by what it measures.
"""
