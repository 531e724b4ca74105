"""FNAS: PPO with a critic that replaces trainings; read controller.py first."""
