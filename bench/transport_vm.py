def measure(): return {}
def records(s): return []
