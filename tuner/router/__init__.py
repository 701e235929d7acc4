"""Which domain a request belongs to, told from its text: `routing` answers, `training` makes what it answers from.

Drafts differ by domain, so a policy has rows by domain; a router finds the row where nobody says the domain.
"""
