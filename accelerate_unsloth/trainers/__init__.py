"""TRL's trainers for several processes: one mixin, and a class for each trainer that takes it."""
