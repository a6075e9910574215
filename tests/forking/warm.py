"""The warm process, run as a script: `warm.py CONNECTION`. It never imports accelerate_unsloth, its ranks do."""

from tests.forking import server

# Nothing comes after this: a forked process replaces the names of this module by those of the script that it runs.
server.main()
