"""The words of a report, for whoever reads one for the first time."""

__all__ = ["WORDS"]

WORDS = {
    "stage": "Training on one domain, starting from what the stage before left.",
    "score at the end": "Average over all domains after the last stage (ACC): what was learnt plus what was kept.",
    "just learnt": "Each domain's score right after its own stage, averaged (LA, learning accuracy): plasticity.",
    "forgetting": "Best score since a domain was learnt minus its score at the end, averaged over all domains but the "
    "last (Chaudhry et al. 2018). Above 0 is bad.",
    "BWT": "Backward transfer: score at the end minus score when just learnt (Lopez-Paz and Ranzato 2017). Below 0 is "
    "bad. Who learnt little has a good BWT for nothing, so it is always read beside just learnt.",
    "nll": "Negative log-likelihood: how surprised the model is by the right answer, in nats per token. 0 is certain; "
    "one nat less means 2.7 times the probability per token.",
    "mitigation": "Whatever protects earlier knowledge while a new domain is learnt: replaying old rows, penalties on "
    "important weights, mixing of weights.",
    "95 % interval": "Seeds and test rows are both a sample, and crossed: all seeds are scored on the same rows. Of a "
    "single seed it is over its test rows only, which says nothing about other seeds.",
    "evidence": "Better or worse: the paired difference to the baseline is shown by a t-test, corrected for everything "
    "this page compares (Holm). Not shown: tested, and it may be chance. One seed: not tested.",
    "noise floor": "How far the choice of test rows alone can move a paired difference.",
    "right to wrong, wrong to right": "Flip rates: the share of test rows whose answer changed sides. Their difference "
    "is the change of accuracy; both may be large where it is small. McNemar's test asks whether the two are equal, of "
    "two trained models.",
    "exact sign-flip test": "Of n seeds the smallest two-sided p is 2/2ⁿ: five seeds cannot reach .05.",
}
