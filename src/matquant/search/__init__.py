"""Plans: which layer is read at which width. Pure: names, shapes and numbers in, a BitPlan out."""
