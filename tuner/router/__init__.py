"""Tells a request's domain from its text, for requests without a label: drafts differ by domain, so policies do."""
