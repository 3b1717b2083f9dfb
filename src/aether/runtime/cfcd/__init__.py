"""cfcd: the model runtime that serves verified packages over one inherited socket."""
