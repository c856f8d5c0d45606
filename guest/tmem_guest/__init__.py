"""The Python of the guest: `tmem-agent` sets up and supervises the `tmem-guest` data paths.

Page data never passes through here: it stays in the native `tmem-guest fs` and `tmem-guest swap` processes.
"""
