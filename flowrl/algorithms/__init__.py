"""Algorithms: one file a method, and the few functions they share. They know no model, no reward and no engine.

A method is a frozen record of hyperparameters (it *is* its config section) with four answers: what it `needs`, which
`kernel` moves a stochastic step, the `plan` of an iteration, the `credit` of each stored edge, and the `loss`.

    fields            the hyperparameters that methods share: type, check and description, once
    schedule          the time grid, and how a group shares its initial noise
    advantages        rewards -> advantages -> credit of the edges
    objectives        the clipped policy-gradient objective, per edge
    kl                distances between the current and the reference step, per edge
    aggregate         from edges to one number; how micro-batches and processes add up
    policy_gradient   the loss made of these parts

A new method is a new file beside them (or `./file.py:Class`); the conformance tests find it by listing the folder.
"""
