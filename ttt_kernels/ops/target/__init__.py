"""Value targets: what a token writes. `next_token_target` (TTT-NTP) and `conv_target` (In-Place TTT)."""
