"""The client's side of the wire: what `pilotlight generate`, the demo and the benches share."""
