"""What training is fed: pictures, clips and their cache."""
