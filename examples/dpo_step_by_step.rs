//! Direct Preference Optimization, derived step by step, with numbers.
//!
//! ```text
//! cargo run --release --example dpo_step_by_step
//! ```
//!
//! prints the derivation from RLHF's objective to the loss that this crate trains with, and what the other losses
//! change about it. Every number is computed here, by the functions of `dpo_lora::loss` wherever there is one, and
//! the tests at the end hold what is printed.
//!
//! The tutorial that this project grew from prints other values in some places. Where it does, its value stands
//! behind ours as `(tutorial 0.1234)`; ours is what the formula beside it gives.
#![expect(clippy::print_stdout, reason = "a tutorial is read on stdout")]

use std::fmt::Write;

use candle_core::{Device, Result, Tensor, Var};
use dpo_lora::loss::{Dpo, Evaluated, Ipo, Kto, Loss, Orpo, Reduction, Scored, Sequence, elementwise};
use dpo_lora::range::Positive;

fn main() -> Result<()> {
    for (number, (title, section)) in SECTIONS.iter().enumerate() {
        let heading = format!("{}. {title}", number + 1);
        println!("{heading}\n{}\n\n{}", "─".repeat(heading.chars().count()), section()?);
    }
    Ok(())
}

/// A title, and what writes the text below it.
type Section = (&'static str, fn() -> Result<String>);

const SECTIONS: [Section; 11] = [
    ("What RLHF asks for", objective),
    ("Preferences from rewards: Bradley-Terry", bradley_terry),
    ("The reward model", reward_model),
    ("The best policy in closed form", closed_form),
    ("The implicit reward, and the sum that cancels", implicit_reward),
    ("The DPO loss", dpo_loss),
    ("What its gradient does", gradient),
    ("What β does", role_of_beta),
    ("IPO: a target instead of a push", ipo),
    ("ORPO and KTO: without a reference, without pairs", orpo_and_kto),
    ("Three classic mistakes", mistakes),
];

// ---- The material -------------------------------------------------------------------------------------------------

/// Five answers to one question: their names, the reference's probabilities, and how good they are.
const ANSWERS: [&str; 5] = ["A", "B", "C", "D", "E"];
const REFERENCE: [f64; 5] = [0.30, 0.25, 0.20, 0.15, 0.10];
const REWARDS: [f64; 5] = [1.0, 3.0, 0.5, 2.5, -0.5];

/// Log-probabilities of whole answers, a column a pair.
struct Pairs<const N: usize> {
    chosen: [f64; N],
    rejected: [f64; N],
    /// The same answers under the reference.
    reference_chosen: [f64; N],
    reference_rejected: [f64; N],
}

const FOUR_PAIRS: Pairs<4> = Pairs {
    chosen: [-1.5, -2.0, -1.8, -2.2],
    rejected: [-2.5, -2.8, -2.0, -3.0],
    reference_chosen: [-1.8, -2.1, -1.9, -2.3],
    reference_rejected: [-2.3, -2.5, -2.1, -2.8],
};
const TWO_PAIRS: Pairs<2> = Pairs {
    chosen: [-1.0, -1.5],
    rejected: [-3.0, -3.5],
    reference_chosen: [-2.0, -2.0],
    reference_rejected: [-2.0, -2.0],
};
const THREE_PAIRS: Pairs<3> = Pairs {
    chosen: [-2.0, -1.5, -2.5],
    rejected: [-3.0, -3.5, -4.0],
    reference_chosen: [-2.1, -1.6, -2.6],
    reference_rejected: [-2.9, -3.4, -3.9],
};

impl<const N: usize> Pairs<N> {
    /// The pairs as the crate's losses take them.
    fn scored(&self) -> Vec<Scored> {
        (0..N)
            .map(|i| {
                pair(
                    answer(self.chosen[i], self.reference_chosen[i]),
                    answer(self.rejected[i], self.reference_rejected[i]),
                )
            })
            .collect()
    }

    /// The labels the wrong way round.
    fn reversed(&self) -> Self {
        Self {
            chosen: self.rejected,
            rejected: self.chosen,
            reference_chosen: self.reference_rejected,
            reference_rejected: self.reference_chosen,
        }
    }
}

fn answer(logp: f64, reference: f64) -> Sequence {
    Sequence { logp, reference: Some(reference), tokens: 1 }
}

fn pair(chosen: Sequence, rejected: Sequence) -> Scored {
    Scored { prompt: None, chosen: Some(chosen), rejected: Some(rejected) }
}

fn dpo(beta: f64) -> Loss {
    Loss::Dpo(Dpo { beta: Positive::constant(beta), ..Dpo::default() })
}

/// The losses of an update of just these examples, and their derivatives.
fn evaluate(loss: &Loss, examples: &[Scored]) -> Result<Evaluated> {
    loss.evaluate(examples, &loss.update(examples, 0.0))
}

/// The loss of an update of just these examples.
fn value(loss: &Loss, examples: &[Scored]) -> Result<f64> {
    Ok(mean(&evaluate(loss, examples)?.losses))
}

/// β Δ: how far the implicit reward of the chosen answer is above the rejected one's.
fn margin(loss: &Loss, example: &Scored) -> f64 {
    let reward = |side: Option<Sequence>| side.and_then(|sequence| loss.reward(&sequence)).unwrap_or(f64::NAN);
    reward(example.chosen) - reward(example.rejected)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn sigmoid(x: f64) -> Result<f64> {
    elementwise::sigmoid(&Tensor::new(x, &Device::Cpu)?)?.to_scalar()
}

/// Loss and slope of a pair whose log-ratios are Δ apart.
fn at_margin(loss: &Loss, delta: f64) -> Result<(f64, f64)> {
    let evaluated = evaluate(loss, &[pair(answer(delta, 0.0), answer(0.0, 0.0))])?;
    Ok((evaluated.losses[0], evaluated.slopes[0].chosen))
}

// ---- The derivation -----------------------------------------------------------------------------------------------

/// max E[r] − β KL, by its trade-off curve.
fn objective() -> Result<String> {
    let mut table = String::from("       β    reward       KL    probability of A, B, C, D, E\n");
    let mut curve = Vec::new();
    for beta in [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 100.0] {
        let (policy, _) = best_policy(beta);
        let (reward, kl) = (expected_reward(&policy), divergence(&policy));
        let _ = writeln!(table, "{beta:>8} {reward:>9.4} {kl:>8.4}    {}", probabilities(&policy));
    }
    for step in 0..1200 {
        let (policy, _) = best_policy(0.02 * 1.01f64.powi(step));
        curve.push((divergence(&policy), expected_reward(&policy)));
    }
    let plot = plot("reward", "KL(π ‖ π_ref)", &[('•', curve)]);
    let prior = expected_reward(&REFERENCE);
    Ok(format!(
        "\
A language model π answers a question x with y. People rate answers by a reward r(x, y).
RLHF looks for the policy with the highest reward that stays close to the model it
started from, the reference π_ref:

    max over π   E_y~π [ r(x, y) ]  −  β KL( π(·|x) ‖ π_ref(·|x) )

Without the second part the policy would give the one best-rated answer for ever, and
exploit every error of r. β is the price of a nat of divergence.

One question, five answers A to E, which the reference gives with probabilities
{} and whose rewards are {}: on average {prior:.3}.
The best policies for different prices (how to find them is section 4):

{table}
Cheap divergence buys nearly the whole reward of B; at a high price the policy stays at
the reference. In between, each β is a point of this curve, and nothing lies above it:

{plot}",
        probabilities(&REFERENCE),
        listed(&REWARDS, 1),
    ))
}

/// σ of the difference of rewards, for all five answers.
fn bradley_terry() -> Result<String> {
    let mut table = String::from("   P(row > column)");
    for answer in ANSWERS {
        let _ = write!(table, "{answer:>8}");
    }
    for (row, reward) in ANSWERS.iter().zip(REWARDS) {
        let _ = write!(table, "\n{row:>18}");
        for other in REWARDS {
            let _ = write!(table, "{:>8.4}", sigmoid(reward - other)?);
        }
    }
    Ok(format!(
        "\
Nobody can say that an answer is worth 2.5. People can say which of two is better.
Bradley and Terry (1952) connect the two: the chance that y_w is preferred to y_l is

    P(y_w > y_l) = exp(r_w) / (exp(r_w) + exp(r_l)) = σ(r_w − r_l)

with σ(z) = 1 / (1 + exp(−z)). For the five answers:

{table}

Only differences count: adding the same number to all rewards of a question changes no
preference. Remember this in section 5.
"
    ))
}

const REWARDS_CHOSEN: [f64; 5] = [2.5, 1.8, 3.0, 2.2, 1.5];
const REWARDS_REJECTED: [f64; 5] = [1.0, 1.5, 0.5, 1.8, 0.8];

/// −log σ(r_w − r_l) of each comparison.
fn reward_model_losses() -> Result<Vec<f64>> {
    let [chosen, rejected] = [REWARDS_CHOSEN, REWARDS_REJECTED].map(|rewards| Tensor::new(&rewards, &Device::Cpu));
    Dpo { beta: Positive::constant(1.0), ..Dpo::default() }.losses(&chosen?, &rejected?)?.to_vec1()
}

fn mean_gap() -> f64 {
    mean(&REWARDS_CHOSEN) - mean(&REWARDS_REJECTED)
}

fn reward_model() -> Result<String> {
    let losses = reward_model_losses()?;
    let mut table = String::from("   chosen  rejected     gap      loss\n");
    for ((chosen, rejected), loss) in REWARDS_CHOSEN.iter().zip(REWARDS_REJECTED).zip(&losses) {
        let _ = writeln!(table, "{chosen:>9.1} {rejected:>9.1} {:>7.1} {loss:>9.6}", chosen - rejected);
    }
    let (loss, gap) = (mean(&losses), mean_gap());
    Ok(format!(
        "\
RLHF first fits a model r to people's comparisons by maximum likelihood of Bradley-Terry:

    L_RM = −E [ log σ(r_w − r_l) ]

A reward model that gave these five comparisons the rewards below would have the loss
{loss:.6} (tutorial 0.2894), with a mean gap of {gap:.2}:

{table}
A gap of 0 costs ln 2 = 0.693147, and a gap that is the wrong way round costs about its
size. Then RLHF trains π against r by reinforcement learning: two models, sampling, and a
policy that finds out where r is wrong. DPO needs neither of the two.

(This is the crate's DPO loss with β = 1, rewards in the place of log-ratios. It is no
coincidence; section 6.)
"
    ))
}

/// The maximiser of the objective, π* = π_ref exp(r / β) / Z, and Z.
fn best_policy(beta: f64) -> ([f64; 5], f64) {
    let mut policy = [0.0; 5];
    for (i, weight) in policy.iter_mut().enumerate() {
        *weight = REFERENCE[i] * (REWARDS[i] / beta).exp();
    }
    let z = policy.iter().sum::<f64>();
    (policy.map(|weight| weight / z), z)
}

fn expected_reward(policy: &[f64; 5]) -> f64 {
    policy.iter().zip(REWARDS).map(|(p, reward)| p * reward).sum()
}

/// KL(π ‖ π_ref) in nats.
fn divergence(policy: &[f64; 5]) -> f64 {
    let terms = policy.iter().zip(REFERENCE).filter(|&(&p, _)| p > 0.0);
    terms.map(|(p, reference)| p * (p / reference).ln()).sum()
}

const BETA: f64 = 0.5;

fn closed_form() -> Result<String> {
    let (best, z) = best_policy(BETA);
    let objective = |policy: &[f64; 5]| expected_reward(policy) - BETA * divergence(policy);
    let mut table = String::from("   policy           E[r]       KL   objective\n");
    for (name, policy) in [("reference", REFERENCE), ("always B", [0.0, 1.0, 0.0, 0.0, 0.0]), ("π*", best)] {
        let (reward, kl) = (expected_reward(&policy), divergence(&policy));
        let _ = writeln!(table, "   {name:<12} {reward:>8.4} {kl:>8.4} {:>11.4}", objective(&policy));
    }
    Ok(format!(
        "\
The objective of section 1 can be maximised by hand. Write it as one expectation,

    E_y~π [ r − β log(π / π_ref) ]  =  −β E_y~π [ log( π / (π_ref exp(r / β)) ) ]

With Z(x) = Σ_y π_ref(y|x) exp(r(x, y) / β), the product π_ref exp(r / β) / Z is a
distribution. Call it π*. Then the objective is

    −β KL( π ‖ π* )  +  β log Z

and as no divergence is below zero, π = π* is the best there is:

    π*(y|x) = π_ref(y|x) exp( r(x, y) / β ) / Z(x)

For the five answers at β = {BETA}:   Z = {z:.4}

    π*        {}
    tutorial  .0654 .9013 .0248 .0998 .0087   which adds up to 1.1: no distribution

{table}
The objective at π* is β log Z = {:.4}, as it should be. For a language model Z is
a sum over all texts there are, so π* cannot be computed. DPO never needs it.
",
        probabilities(&best),
        BETA * z.ln(),
    ))
}

fn implicit_reward() -> Result<String> {
    let loss = dpo(BETA);
    let (best, z) = best_policy(BETA);
    let implicit: Vec<f64> = (best.iter().zip(REFERENCE))
        .filter_map(|(p, reference)| loss.reward(&answer(p.ln(), reference.ln())))
        .collect();
    let recovered: Vec<f64> = implicit.iter().map(|reward| reward + BETA * z.ln()).collect();
    let mut table = String::from("   answer   β log(π*/π_ref)   + β log Z   true reward\n");
    for (i, answer) in ANSWERS.iter().enumerate() {
        let _ = writeln!(table, "   {answer:<6} {:>17.4} {:>11.4} {:>13.1}", implicit[i], recovered[i], REWARDS[i]);
    }
    let (with_z, without_z) = (sigmoid(recovered[1] - recovered[4])?, sigmoid(implicit[1] - implicit[4])?);
    Ok(format!(
        "\
Now read the closed form backwards. Every policy is the best one for some reward:

    r(x, y) = β log( π*(y|x) / π_ref(y|x) )  +  β log Z(x)

The first part is the policy's implicit reward. From the policy of section 4:

{table}
Z(x) is still in the way. But preferences are made of differences between two answers to
the same question, and β log Z(x) is the same in both:

    r_w − r_l = β log( π*(y_w) / π_ref(y_w) )  −  β log( π*(y_l) / π_ref(y_l) )

    P(B > E)   with Z {with_z:.6}   without {without_z:.6}
"
    ))
}

fn dpo_loss() -> Result<String> {
    let loss = dpo(0.1);
    let examples = FOUR_PAIRS.scored();
    let evaluated = evaluate(&loss, &examples)?;
    let mut table = String::from("      a_w      a_l       Δ      βΔ      loss\n");
    for (i, (example, loss_of_pair)) in examples.iter().zip(&evaluated.losses).enumerate() {
        let chosen = FOUR_PAIRS.chosen[i] - FOUR_PAIRS.reference_chosen[i];
        let rejected = FOUR_PAIRS.rejected[i] - FOUR_PAIRS.reference_rejected[i];
        let (delta, margin) = (tidy(chosen - rejected), tidy(margin(&loss, example)));
        let _ = writeln!(table, "{chosen:>9.1} {rejected:>8.1} {delta:>7.1} {margin:>7.2} {loss_of_pair:>9.6}");
    }
    let four = mean(&evaluated.losses);
    let two = value(&loss, &TWO_PAIRS.scored())?;
    let reversed = value(&loss, &TWO_PAIRS.reversed().scored())?;
    let initial = loss.initial_value(&examples).unwrap_or(f64::NAN);
    Ok(format!(
        "\
So skip the reward model: fit people's comparisons by maximum likelihood as in section 3,
with the implicit reward of the policy itself. With a = log π(y|x) − log π_ref(y|x), the
log-ratio of an answer,

    Δ = a_w − a_l            L_DPO = −E [ log σ(β Δ) ]

(Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, eq. 7). A log-probability of an
answer is the sum over its tokens. Four pairs at β = 0.1:

{table}
    mean                            {four:.6}   (tutorial 0.6839)

A policy that equals its reference has Δ = 0 for every pair, whatever the pair, so training
starts at exactly ln 2 = {initial:.6}. A first loss that is anything else is a bug.

Two pairs that the policy has learned well, Δ = 2:   {two:.6}   (tutorial 0.6632)
The same with the labels reversed:                   {reversed:.6}   (tutorial 0.7230)

The two differ by the margin, {:.1}, as they must: −log σ(−m) = m − log σ(m).
",
        reversed - two
    ))
}

const GRADIENT_CHOSEN: [f64; 5] = [2.0, 0.5, -0.5, 1.5, -1.0];
const GRADIENT_REJECTED: [f64; 5] = [-1.0, 0.0, 0.5, -0.5, 1.5];

/// The weights σ(−βΔ), read off the derivative that the crate computes.
fn gradient_weights() -> Result<Vec<f64>> {
    let loss = dpo(0.5);
    let weight = |(chosen, rejected)| {
        let evaluated = evaluate(&loss, &[pair(answer(chosen, 0.0), answer(rejected, 0.0))])?;
        Ok(-evaluated.slopes[0].chosen / 0.5)
    };
    GRADIENT_CHOSEN.into_iter().zip(GRADIENT_REJECTED).map(weight).collect()
}

fn gradient() -> Result<String> {
    let mut table = String::from("      a_w      a_l       Δ    weight\n");
    for ((chosen, rejected), weight) in GRADIENT_CHOSEN.iter().zip(GRADIENT_REJECTED).zip(gradient_weights()?) {
        let bar = "█".repeat((weight * 40.0).round() as usize);
        let _ = writeln!(table, "{chosen:>9.1} {rejected:>8.1} {:>7.1} {weight:>9.4}  {bar}", chosen - rejected);
    }
    Ok(format!(
        "\
Differentiated with respect to the policy's parameters, the loss is

    ∇L_DPO = −β E [ σ(−βΔ) · ( ∇log π(y_w|x) − ∇log π(y_l|x) ) ]

The chosen answer is made likelier and the rejected one less likely, each pair as strongly
as the policy is still wrong about it: σ(−βΔ) is the probability that the policy gives to
the wrong order. At β = 0.5:

{table}
Without this weight the rejected answers would be pushed down for ever, and the policy
with them. Note that only Δ is pushed: the log-probability of the chosen answer may fall,
as long as that of the rejected one falls faster.
"
    ))
}

/// β, margin and loss of the three pairs.
fn by_beta() -> Result<Vec<(f64, f64, f64)>> {
    let examples = THREE_PAIRS.scored();
    let at = |beta| {
        let loss = dpo(beta);
        Ok((beta, margin(&loss, &examples[0]), value(&loss, &examples)?))
    };
    [0.01, 0.1, 0.5, 1.0].into_iter().map(at).collect()
}

fn role_of_beta() -> Result<String> {
    let tutorial = ["0.6920", "0.6726", "0.5534", "0.4229"];
    let mut table = format!(
        "{:>7} {:>11} {:>10} {:>17} {:>7} {:>9} {:>11}\n",
        "β", "margin βΔ", "loss", "", "weight", "slope", "Δ for 90 %"
    );
    for ((beta, margin, loss), tutorial) in by_beta()?.into_iter().zip(tutorial) {
        let weight = sigmoid(-margin)?;
        let _ = writeln!(
            table,
            "{beta:>7} {margin:>11} {loss:>10.6} (tutorial {tutorial}) {weight:>7.4} {:>9.5} {:>11.1}",
            -beta * weight,
            9f64.ln() / beta,
            margin = tidy(margin),
        );
    }
    let curve = |at: f64| -> Result<Vec<(f64, f64)>> {
        let loss = dpo(at);
        (-80..=80).map(|x| f64::from(x) / 10.0).map(|delta| Ok((delta, at_margin(&loss, delta)?.0))).collect()
    };
    let plot = plot("loss", "Δ (nats)", &[('·', curve(0.1)?), ('o', curve(0.5)?), ('#', curve(1.0)?)]);
    Ok(format!(
        "\
Three pairs that the policy tells apart by Δ = 0.2 nats each:

{table}
(`slope` is the loss's derivative in the chosen answer's log-probability, −β σ(−βΔ); the
last column is the Δ at which the policy gives 90 % to the right order, ln 9 / β.)

β converts nats into certainty. With a small β a pair counts as learned only when the
policy is many nats away from the reference; with a large one a small step is enough, and
the weight σ(−βΔ) then ends the push. So a large β keeps the policy near the reference,
although its slope at the start is steeper. β = 0.1 (·), 0.5 (o) and 1 (#):

{plot}"
    ))
}

fn ipo_by_sums() -> Ipo {
    Ipo { beta: Positive::constant(0.1), reduction: Reduction::Sum }
}

fn ipo() -> Result<String> {
    let (ipo, dpo) = (Loss::Ipo(ipo_by_sums()), dpo(0.1));
    let target = ipo_by_sums().target();
    let mut table = String::from("       Δ        IPO  slope        DPO     slope\n");
    for delta in [0.0, 3.0, 5.0, 8.0, 50.0] {
        let ((ipo, ipo_slope), (dpo, dpo_slope)) = (at_margin(&ipo, delta)?, at_margin(&dpo, delta)?);
        let note = if delta == 3.0 { "   (tutorial 0.5444)" } else { "" };
        let _ = writeln!(table, "{delta:>8} {ipo:>10} {ipo_slope:>6} {dpo:>10.6} {dpo_slope:>9.6}{note}");
    }
    let curve = |loss: &Loss| -> Result<Vec<(f64, f64)>> {
        let start = at_margin(loss, 0.0)?.0;
        (-20..=120).map(|x| f64::from(x) / 10.0).map(|at| Ok((at, at_margin(loss, at)?.0 / start))).collect()
    };
    let plot = plot("loss / loss at 0", "Δ (nats)", &[('·', curve(&dpo)?), ('o', curve(&ipo)?)]);
    Ok(format!(
        "\
If one answer was preferred every time it was asked, the likelihood is highest at Δ = ∞,
and no β holds the policy back. IPO (Azar et al. 2023, https://arxiv.org/abs/2310.12036)
asks for a margin and no more:

    L_IPO = ( Δ − 1 / 2β )²

At β = 0.1 the target is Δ = 1 / 2β = {target}:

{table}
DPO's loss falls for ever and IPO's turns around at its target. DPO (·) and IPO (o), both
divided by their loss at Δ = 0:

{plot}
The paper takes log-probabilities as sums (`reduction = \"sum\"`, here). TRL divides them by
the number of tokens (`\"token_mean\"`, the crate's default), and its target is per token.
"
    ))
}

fn orpo_and_kto() -> Result<String> {
    let orpo = Orpo::default();
    let mut odds = String::from("    P(y_w)    P(y_l)    log odds ratio    −log σ\n");
    for (chosen, rejected) in [(0.3, 0.5), (0.5, 0.5), (0.5, 0.3), (0.9, 0.3), (0.9, 0.001)] {
        let logp = |p: f64| Tensor::new(&[p.ln()], &Device::Cpu);
        let ratio = orpo.log_odds_ratios(&logp(chosen)?, &logp(rejected)?)?;
        let loss = elementwise::log_sigmoid(&ratio)?.neg()?;
        let [ratio, loss] = [ratio, loss].map(|t| t.sum_all()?.to_scalar::<f64>());
        let _ = writeln!(odds, "{chosen:>10} {rejected:>9} {:>17.4} {:>9.6}", ratio?, loss?);
    }
    let certain = -1e-8f32;
    let naive = (certain.exp() / (1.0 - certain.exp())).ln();
    let one = |logp: f64| Tensor::new(&[logp], &Device::Cpu);
    let stable = orpo.log_odds_ratios(&one(certain.into())?, &one(0.5f64.ln())?)?.to_vec1::<f64>()?[0];

    let kto = Loss::Kto(Kto::default());
    let single = |a: f64, desirable: bool| -> Result<(f64, f64)> {
        let side = |wanted| Some(answer(a, 0.0)).filter(|_| wanted == desirable);
        let example = Scored { prompt: None, chosen: side(true), rejected: side(false) };
        let evaluated = evaluate(&kto, &[example])?;
        Ok((evaluated.losses[0], evaluated.slopes[0].chosen + evaluated.slopes[0].rejected))
    };
    let mut shapes = String::from("       a     desirable  slope      undesirable  slope\n");
    for a in [-60.0, -20.0, 0.0, 20.0, 60.0] {
        let ((good, down), (bad, up)) = (single(a, true)?, single(a, false)?);
        let _ = writeln!(shapes, "{a:>8} {good:>10.4} {down:>9.5} {bad:>13.4} {up:>9.5}");
    }
    Ok(format!(
        "\
ORPO (Hong et al. 2024, https://arxiv.org/abs/2403.07691) does without the reference. It
fine-tunes on the chosen answer and, on top of that, compares the odds of the two answers,
with P(y) the mean probability of a token (the geometric mean):

    odds(y) = P(y) / (1 − P(y))
    L_ORPO  = −log P(y_w)  −  β log σ( log odds(y_w) − log odds(y_l) )

{odds}
The odds of an answer that is nearly certain are nearly infinite. At log P = −1e-8 against
log P = log ½, exp/(1−exp) in f32 gives {naive}; log P − log1mexp(log P) gives {stable:.4}.

KTO (Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306) does without pairs. An
answer is desirable or not by itself, and what is compared with its log-ratio a is the
policy's mean divergence z from the reference:

    desirable    L_KTO = 1 − σ(β (a − z))
    undesirable  L_KTO = 1 − σ(β (z − a))

At β = 0.1 and z = 0:

{shapes}
The loss saturates on both sides, as people's sense of gains and losses does: an answer
that is hopeless (or mislabelled) is given up, where DPO's slope would be at its steepest.
"
    ))
}

/// Sequences of token log-probabilities under policy and reference: the sum, and the number of tokens.
fn of_tokens(policy: &[f64], reference: &[f64]) -> Sequence {
    Sequence { logp: policy.iter().sum(), reference: Some(reference.iter().sum()), tokens: policy.len() }
}

/// What the mistakes are made on: 40 tokens chosen and 20 rejected, with 0.05 nats a token learned in each.
fn long_pair() -> Scored {
    let learned = |tokens: usize, by: f64| of_tokens(&vec![-1.2 + by; tokens], &vec![-1.2; tokens]);
    pair(learned(40, 0.05), learned(20, -0.05))
}

/// Loss and weight of a pair.
fn loss_and_weight(example: Scored) -> Result<(f64, f64)> {
    let evaluated = evaluate(&dpo(0.1), &[example])?;
    Ok((evaluated.losses[0], -evaluated.slopes[0].chosen / 0.1))
}

/// The three mistakes, each as loss and weight.
struct Mistakes {
    right: (f64, f64),
    averaged: (f64, f64),
    /// At the start of training, where the loss should be ln 2.
    no_reference: (f64, f64),
    padded: (f64, f64),
    /// Where the reference is the policy, with and without its gradient: loss and derivative in the log-probability.
    moving: [(f64, f64); 2],
}

fn made_mistakes() -> Result<Mistakes> {
    let example = long_pair();
    let change = |of: fn(Sequence) -> Sequence| Scored {
        prompt: None,
        chosen: example.chosen.map(of),
        rejected: example.rejected.map(of),
    };
    let averaged = change(|s| {
        let tokens = s.tokens as f64;
        Sequence { logp: s.logp / tokens, reference: s.reference.map(|r| r / tokens), ..s }
    });
    let no_reference = change(|s| Sequence { logp: s.reference.unwrap_or(f64::NAN), reference: Some(0.0), ..s });
    // 20 tokens of padding after the shorter answer; nothing trains what comes after the end, so they drift apart
    let mut padded = example;
    padded.rejected = example.rejected.map(|s| {
        let (logp, reference) = (s.logp - 20.0 * 6.0, s.reference.map(|r| r - 20.0 * 5.0));
        Sequence { logp, reference, ..s }
    });

    let moving = |reference_of: fn(&Tensor) -> Tensor| -> Result<(f64, f64)> {
        let logp = Var::new(-46.0f64, &Device::Cpu)?;
        let log_ratio = (logp.as_tensor() - reference_of(&logp))?;
        let loss = Dpo::default().losses(&log_ratio, &Tensor::new(0.0f64, &Device::Cpu)?)?;
        let slope = loss.backward()?.get(&logp).map_or(Ok(f64::NAN), Tensor::to_scalar);
        Ok((loss.to_scalar()?, slope?))
    };
    Ok(Mistakes {
        right: loss_and_weight(example)?,
        averaged: loss_and_weight(averaged)?,
        no_reference: loss_and_weight(no_reference)?,
        padded: loss_and_weight(padded)?,
        moving: [moving(Tensor::clone)?, moving(Tensor::detach)?],
    })
}

fn mistakes() -> Result<String> {
    let Mistakes { right, averaged, no_reference, padded, moving } = made_mistakes()?;
    let row = |(loss, weight): (f64, f64)| format!("loss {loss:.6}   weight {weight:.4}");
    let moving_row = |(loss, slope): (f64, f64)| format!("loss {loss:.6}   slope {slope:.2}");
    Ok(format!(
        "\
One pair at β = 0.1: 40 chosen and 20 rejected tokens of −1.2 nats under the reference,
of which the policy has made each chosen one 0.05 likelier and each rejected one 0.05 less.
Δ = 40 · 0.05 + 20 · 0.05 = 3.

    as it should be                       {}

1. Log-probabilities averaged over tokens instead of summed.

    averaged                              {}

   The implicit reward belongs to the whole answer. Averaged, Δ is 0.1 and not 3: β is
   divided by the length, by another length for each answer. Nothing fails; the policy
   just runs much further from the reference than β says.
   To see it: the log-probabilities of answers are near −1, whatever their length.

2. A reference that is missing, or that is the policy.

    no reference, before the first step   {}
    reference = policy, with gradient     {}
    reference = policy, without           {}

   Without π_ref the longer answer counts as the worse one from the start, before anything
   was learned: DPO becomes a lesson in brevity. If the reference is computed with the
   adapters on, every log-ratio is zero. Then the two gradients cancel and nothing is
   learned; or, without the reference's gradient, every pair is pushed with weight ½ for
   ever. The reference is the model as it was, frozen, and gets no gradient.
   To see it: the first loss is not ln 2; or no later one is anything else.

3. Tokens scored that are not the answer's: the padding, or the prompt.

    20 tokens of padding scored           {}

   Only the shorter answer is padded, and what follows the end of a text is trained by
   nobody, so its log-ratio drifts: here by −1 nat a token, which makes the pair look
   learned. The prompt is worse hidden. It is the same on both sides and cancels in DPO's
   Δ, but not in a mean over tokens (IPO), in ORPO's odds, or in KTO, which has one side.
   To see it: the result depends on which other pairs are in the batch.
",
        row(right),
        row(averaged),
        row(no_reference),
        moving_row(moving[0]),
        moving_row(moving[1]),
        row(padded),
    ))
}

// ---- Printing -----------------------------------------------------------------------------------------------------

/// `.0176 .8010 ...`
fn probabilities(policy: &[f64; 5]) -> String {
    policy.map(|p| format!("{p:.4}").trim_start_matches('0').to_owned()).join(" ")
}

/// Without the last digits, which are rounding, and without the sign of a zero.
fn tidy(value: f64) -> f64 {
    (value * 1e9).round() / 1e9 + 0.0
}

fn listed(values: &[f64], digits: usize) -> String {
    values.iter().map(|value| format!("{value:.digits$}")).collect::<Vec<_>>().join(" ")
}

/// Curves drawn with characters; a later curve goes over an earlier one.
fn plot(y_name: &str, x_name: &str, curves: &[(char, Vec<(f64, f64)>)]) -> String {
    const WIDTH: usize = 64;
    const HEIGHT: usize = 16;
    let range = |of: fn(&(f64, f64)) -> f64| {
        let values = || curves.iter().flat_map(|(_, points)| points.iter().map(of));
        (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max))
    };
    let ((left, right), (bottom, top)) = (range(|point| point.0), range(|point| point.1));
    let mut cells = vec![vec![' '; WIDTH]; HEIGHT];
    for (mark, points) in curves {
        for (x, y) in points {
            let column = (x - left) / (right - left) * (WIDTH - 1) as f64;
            let row = (top - y) / (top - bottom) * (HEIGHT - 1) as f64;
            cells[row.round() as usize][column.round() as usize] = *mark;
        }
    }
    let mut text = format!("    {y_name}\n");
    for (i, row) in cells.iter().enumerate() {
        let label = match i {
            0 => format!("{top:.2}"),
            i if i == HEIGHT - 1 => format!("{bottom:.2}"),
            _ => String::new(),
        };
        let _ = writeln!(text, "{label:>8} ┤{}", row.iter().collect::<String>().trim_end());
    }
    let _ = writeln!(text, "{:>9}└{}", "", "─".repeat(WIDTH));
    let right = format!("{right:.1}  {x_name}");
    let _ = writeln!(text, "{:>10}{:<width$}{right}", "", format!("{left:.1}"), width = WIDTH - 4);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Requires the section to print lines that have these words in this order.
    #[track_caller]
    fn prints(section: fn() -> Result<String>, lines: &[&str]) {
        let text = section().expect("a section");
        for line in lines {
            let words: Vec<&str> = line.split_whitespace().collect();
            let found = text.lines().any(|line| {
                let on_line: Vec<&str> = line.split_whitespace().collect();
                on_line.windows(words.len()).any(|window| window == words)
            });
            assert!(found, "no line with `{line}` in\n{text}");
        }
    }

    #[test]
    fn the_objective_trades_reward_for_divergence() {
        prints(
            objective,
            &["0.1 2.9980 1.3621", "0.5 2.8646 0.8935 .0176 .8010 .0043 .1768 .0003", "100 1.4889 0.0001"],
        );
        let points = [0.1, 0.5, 2.0, 10.0].map(|beta| best_policy(beta).0);
        for pair in points.windows(2) {
            assert!(expected_reward(&pair[0]) > expected_reward(&pair[1]));
            assert!(divergence(&pair[0]) > divergence(&pair[1]));
        }
    }

    #[test]
    fn preferences() {
        // B over each of the five
        prints(bradley_terry, &["B 0.8808 0.5000 0.9241 0.6225 0.9707"]);
    }

    #[test]
    fn the_reward_model() {
        prints(reward_model, &["0.350172 (tutorial 0.2894), with a mean gap of 1.08:", "2.5 1.0 1.5 0.201413"]);
    }

    #[test]
    fn the_closed_form() {
        prints(closed_form, &["π* .0176 .8010 .0043 .1768 .0003", "β log Z = 2.4178,", "π* 2.8646 0.8935 2.4178"]);
        // no policy a little way off is better
        let (best, _) = best_policy(BETA);
        let objective = |policy: &[f64; 5]| expected_reward(policy) - BETA * divergence(policy);
        for (from, to) in (0..5).flat_map(|from| (0..5).map(move |to| (from, to))).filter(|(from, to)| from != to) {
            let mut other = best;
            other[from] -= 1e-4;
            other[to] += 1e-4;
            assert!(objective(&other) < objective(&best), "{from} {to}");
        }
    }

    #[test]
    fn implicit_rewards_are_the_true_ones() {
        prints(
            implicit_reward,
            &[
                "A -1.4178 1.0000 1.0",
                "B 0.5822 3.0000 3.0",
                "C -1.9178 0.5000 0.5",
                "D 0.0822 2.5000 2.5",
                "E -2.9178 -0.5000 -0.5",
                "with Z 0.970688 without 0.970688",
            ],
        );
    }

    #[test]
    fn the_dpo_loss() {
        prints(
            dpo_loss,
            &[
                "0.678303 (tutorial 0.6839)",
                "ln 2 = 0.693147.",
                "0.598139 (tutorial 0.6632)",
                "0.798139 (tutorial 0.7230)",
                "margin, 0.2,",
            ],
        );
    }

    #[test]
    fn the_gradient_weights() {
        prints(gradient, &["3.0 0.1824", "0.5 0.4378", "-1.0 0.6225", "2.0 0.2689", "-2.5 0.7773"]);
    }

    #[test]
    fn the_role_of_beta() {
        prints(
            role_of_beta,
            &[
                "0.01 0.002 0.692148 (tutorial 0.6920)",
                "0.1 0.02 0.683197 (tutorial 0.6726)",
                "0.5 0.1 0.644397 (tutorial 0.5534)",
                "1 0.2 0.598139 (tutorial 0.4229)",
            ],
        );
    }

    #[test]
    fn ipo_has_a_target() {
        prints(ipo, &["1 / 2β = 5:", "0 25 -10 0.693147", "3 4 -4 0.554355", "(tutorial 0.5444)", "5 0 0", "8 9 6"]);
    }

    #[test]
    fn odds_and_single_answers() {
        // log(0.5 / 0.5) − log(0.3 / 0.7) = 0.8473; −log σ of it is log(1 + 3/7)
        prints(orpo_and_kto, &["0.5 0.3 0.8473 0.356675", "0.5 0.5 0.0000 0.693147", "in f32 gives inf;"]);
        // σ(2) and its slope σ(2) σ(−2) / 10
        prints(orpo_and_kto, &["-20 0.8808 -0.01050 0.1192 0.01050", "0 0.5000 -0.02500 0.5000 0.02500"]);
    }

    #[test]
    fn mistakes_show() {
        let made = made_mistakes().expect("mistakes");
        let close = |(loss, weight): (f64, f64), margin: f64| {
            assert!((loss - (-margin).exp().ln_1p()).abs() < 1e-12, "{loss}");
            assert!((weight - 1.0 / (1.0 + margin.exp())).abs() < 1e-12, "{weight}");
        };
        close(made.right, 0.3);
        close(made.averaged, 0.01);
        close(made.no_reference, -2.4);
        close(made.padded, 2.3);
        // −β / 2: the steepest that a pair without a margin can be
        let ln_2 = std::f64::consts::LN_2;
        assert_eq!(made.moving, [(ln_2, 0.0), (ln_2, -0.05)]);
        prints(
            mistakes,
            &["loss 0.554355 weight 0.4256", "loss 2.486836 weight 0.9168", "slope 0.00", "slope -0.05"],
        );
    }
}
