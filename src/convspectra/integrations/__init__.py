"""Training frameworks: each module needs one optional package, and nothing else imports it.

Import what you need, such as `convspectra.integrations.lightning`; a missing package is an
ImportError that names the extra to install.
"""
