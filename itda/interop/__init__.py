"""Bridges to other libraries, one module each; none is imported by the rest of this one until it is asked for."""
