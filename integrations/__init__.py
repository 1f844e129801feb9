"""The optimizer inside other projects' training loops, on eight CPU devices."""
