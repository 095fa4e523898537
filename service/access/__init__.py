"""Who may do what: keys and their scopes, quotas, and what is refused before any route runs.
Everything that the table of scopes does not name is closed.

scopes     which scope each route needs; a path that is not in the table reaches no route
keys       a key, its hash, and the token that its holder sends
key_file   keys as lines of JSON: parsed, read, written
keyring    the keys in force, from file and environment
guard      the one decision about a request
"""
