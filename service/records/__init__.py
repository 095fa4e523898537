"""What the service writes down for people who ask later: the audit log and the decision log.

Start reading at `audit`. Both are files of JSON lines that all processes of the service append to;
docs/records.md describes them.
"""
