"""What a student adds to Nerfstudio's viewer: a line of its own speed, and a split with its teacher."""
