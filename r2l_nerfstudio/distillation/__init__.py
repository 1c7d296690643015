"""Where supervision comes from: pseudo cameras, a ring of teacher views, hard rays, real photographs."""
