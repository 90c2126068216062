"""Algorithms: one file a method, and the few functions they share. They know no model, no reward and no engine.

A method is a frozen record of hyperparameters (it *is* its config section) with four answers: what it `needs`, which
`kernel` moves a stochastic step, the `plan` of an iteration, the `credit` of each stored edge, and the `loss`.

    fields            the hyperparameters that methods share: type, check and description, once
    schedule          the time grid, and how a group shares its initial noise
    advantages        rewards -> advantages -> credit of the edges, or of tokens
    objectives        the clipped policy-gradient objective, per edge: a step, or a token
    kl                distances between the current policy and the reference, per edge
    aggregate         from edges to one number; how micro-batches and processes add up
    corrections       weights of answers that another policy wrote
    preference_terms  losses of chosen and rejected samples, of velocities and of answers
    policy_gradient   the loss made of these parts, for steps
    token_policy_gradient, token_fields   the same for a model that writes, which has no plan and no kernel

A new method is a new file beside them (or `./file.py:Class`); the conformance tests find it by listing the folder.
"""
