"""Attack a server as a hostile or clumsy client would, and measure what a polite client sees.

    python -m benchmarks.attacks                              every attack, 30 s each
    python -m benchmarks.attacks --source ../before --json before.json
    python -m benchmarks.attacks --only chunks webp --seconds 8

The server runs pinned to one core, from the source tree that --source names, with the demo bundle.
Attacker and polite client run on another core. The polite client offers 30 % of what the server can
answer; it opens a connection for each request, and a request counts if it is answered with 200
within its budget, as the client measures it. The record of a change has two runs, one of the tree
before it and one after.

    base          what an attack is, and a connection to attack with
    registry      the attacks by name; each other module holds one kind
    attacker      runs one attack in a process of its own, on the attacker's core
    polite        the polite client, and the probe of /livez
    server        the server under attack: its process, memory and log
    measurement   one attack from start to recovery, as one row of the table
"""
