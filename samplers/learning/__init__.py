"""What is learned of a model, by forward evaluations of it alone: the containers, their files, and how
each is measured."""
