use proptest::prelude::*;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::Deserialize;

use super::*;

const FEW: Bootstrap = Bootstrap { draws: 200, seed: 1 };

fn close(is: f64, ought: f64, tolerance: f64) {
    assert!((is - ought).abs() <= tolerance, "{is} is not {ought}");
}

/// By scipy and scikit-learn; see scripts/make_statistics_fixtures.py.
#[derive(Deserialize)]
struct Fixture {
    sign: Vec<(usize, usize, f64)>,
    wilson: Vec<(usize, usize, f64, f64)>,
    length: Vec<LengthCase>,
    style: Vec<StyleCase>,
    markup: Vec<Markup>,
    judges: Vec<Judges>,
    ranking: Vec<RankingCase>,
}

#[derive(Deserialize)]
struct LengthCase {
    scores: Vec<f64>,
    policy: Vec<usize>,
    against: Vec<usize>,
    ridge: f64,
    theta: f64,
    phi: f64,
}

#[derive(Deserialize)]
struct StyleCase {
    scores: Vec<f64>,
    policy: Vec<[usize; 4]>,
    against: Vec<[usize; 4]>,
    ridge: f64,
    theta: f64,
    phi: Vec<f64>,
}

#[derive(Deserialize)]
struct Markup {
    text: String,
    headers: usize,
    lists: usize,
    bold: usize,
}

#[derive(Deserialize)]
struct Judges {
    one: Vec<f64>,
    other: Vec<f64>,
    agreement: f64,
    agreement_without_ties: f64,
    kappa: f64,
    spearman: f64,
}

#[derive(Deserialize)]
struct RankingCase {
    wins: Vec<Vec<f64>>,
    beta: Vec<f64>,
}

fn fixture() -> Fixture {
    serde_json::from_str(include_str!("../../tests/fixtures/statistics.json")).expect("JSON")
}

#[test]
fn intervals_of_shares_are_scipys() {
    for (k, n, low, high) in fixture().wilson {
        let [is_low, is_high] = wilson(k, n);
        close(is_low, low, 1e-12);
        close(is_high, high, 1e-12);
    }
    assert_eq!(wilson(0, 0), [0.0, 1.0]);
    // to the digits they are printed with elsewhere
    for (k, n, low, high) in [(57, 100, 0.472154, 0.662667), (310, 500, 0.576692, 0.661478)] {
        close(wilson(k, n)[0], low, 5e-7);
        close(wilson(k, n)[1], high, 5e-7);
    }
    assert_eq!((wilson(0, 20)[0], wilson(20, 20)[1]), (0.0, 1.0));
}

#[test]
fn sign_test_is_scipys_however_large() {
    for (wins, losses, p) in fixture().sign {
        // relative: a p of 1e-50 has digits too. scipy's own tail has about ten
        close(sign_test(wins, losses) / p, 1.0, 1e-9);
        assert_eq!(sign_test(wins, losses), sign_test(losses, wins));
        assert_eq!(mcnemar(wins, losses), sign_test(wins, losses));
    }
    close(sign_test(57, 43), 0.193348, 5e-7);
    close(sign_test(310, 190), 8.962859e-8, 5e-15);
    // as much as f64 has, and nothing that takes forever
    assert_eq!(sign_test(5_000_000_000, 0), 0.0);
    close(sign_test(500_000_000_000, 500_000_000_000), 1.0, 0.0);
    assert!((0.04..0.05).contains(&sign_test(500_001_000_000, 499_999_000_000)));
}

#[test]
fn votes_become_scores() {
    assert_eq!(Order::PolicyFirst.policy(0.75), 0.75);
    assert_eq!(Order::PolicySecond.policy(0.75), 0.25);
    let all = [Verdict::MuchA, Verdict::A, Verdict::Tie, Verdict::B, Verdict::MuchB];
    assert_eq!(all.map(|verdict| verdict.vote(Scale::Three)), [1.0, 1.0, 0.5, 0.0, 0.0]);
    assert_eq!(all.map(|verdict| verdict.vote(Scale::Five)), [1.0, 0.75, 0.5, 0.25, 0.0]);
    let both = Votes { first: Some(1.0), second: Some(0.0) };
    assert_eq!((both.score(), both.conservative()), (Some(0.5), Some(0.5)));
    let sure = Votes { first: Some(0.75), second: Some(1.0) };
    assert_eq!((sure.score(), sure.conservative()), (Some(0.875), Some(1.0)));
    let half = Votes { first: None, second: Some(0.0) };
    assert_eq!((half.score(), half.conservative(), half.score_of_any()), (None, None, Some(0.0)));
}

#[test]
fn label_share_is_alpaca_evals_and_knows_what_is_no_vote() {
    let p = |x: f64| x.ln();
    // white space is no other label; alpaca_eval: 2 − exp(lp_m − logsumexp(lp_m, lp_M)) is 1 + the share of M
    let tokens = [(" M", p(0.5)), ("m", p(0.2)), ("M", p(0.1)), ("x", p(0.2))];
    close(label_share(tokens, "M", "m").expect("there is one"), 0.75, 1e-12);
    close(label_share(tokens, "m", "M").expect("there is one"), 0.25, 1e-12);
    assert_eq!(label_share([("M", p(0.9))], "M", "m"), Some(1.0));
    assert_eq!(label_share([("M", p(0.3)), ("m", p(0.1)), ("The", p(0.6))], "M", "m"), None);
    assert_eq!(label_share([], "M", "m"), None);
    assert_eq!(label_share([("M", f64::NAN)], "M", "m"), None);
}

#[test]
fn order_table_has_the_published_numbers() {
    let orders = Orders::of_table([[41, 6, 3], [8, 30, 2], [3, 2, 5]]).expect("there is one");
    assert_eq!(orders.agreement, 0.76);
    close(orders.kappa.expect("there is one"), 0.584775, 5e-7);
    close(orders.first_slot_share.expect("there is one"), 88.0 / 180.0, 1e-12);
    assert_eq!(orders.flip_rate, 0.14);
    assert!(orders.warnings().is_empty());
    // the same prompts as votes
    let value = [1.0, 0.0, 0.5];
    let (mut scores, mut conservative, mut outcomes) = (Vec::new(), Vec::new(), Vec::new());
    for (row, first) in orders.table.iter().zip(value) {
        for (&count, second) in row.iter().zip(value) {
            let votes = Votes { first: Some(first), second: Some(second) };
            for _ in 0..count {
                scores.push(votes.score().expect("there is one"));
                conservative.push(votes.conservative().expect("there is one"));
                outcomes.push(votes.outcomes().expect("there is one"));
            }
        }
    }
    assert_eq!(Orders::of(outcomes).expect("there is one"), orders);
    let clusters = Clusters::each(scores.len());
    let win_rate = FEW.share(&scores, &clusters);
    close(win_rate.estimate, 0.56, 1e-12);
    close(win_rate.standard_error, 0.0426579, 5e-8);
    close(standard_error(&scores), 0.0426579, 5e-8);
    assert_eq!(Outcomes::of(&conservative), Outcomes { wins: 41, losses: 30, ties: 29 });
    close(mean(&conservative), 0.555, 1e-12);
}

#[test]
fn a_judge_that_always_says_a_is_seen_through() {
    let outcomes = vec![[Outcome::Win, Outcome::Loss]; 40];
    let orders = Orders::of(outcomes).expect("there is one");
    assert_eq!((orders.agreement, orders.flip_rate, orders.first_slot_share), (0.0, 1.0, Some(1.0)));
    assert_eq!(orders.warnings().len(), 2);
    assert_eq!(Orders::of([]), None);
    let ties = Orders::of([[Outcome::Tie; 2]]).expect("there is one");
    assert_eq!((ties.first_slot_share, ties.kappa), (None, None));
}

#[test]
fn sample_sizes_are_the_published_ones() {
    let cases = [(0.45, 0.10, 159), (0.45, 0.05, 636), (0.45, 0.03, 1766), (0.35, 0.05, 385)];
    for (sd, difference, n) in cases {
        assert_eq!(prompts_needed(sd, difference), n);
        let detectable = |n: usize| detectable_difference(sd / (n as f64).sqrt());
        assert!(detectable(n) <= difference && detectable(n - 1) > difference);
    }
}

#[test]
fn unresolved_prompts_widen_what_may_be_true() {
    assert_eq!(bounds(&[1.0, 0.5, 0.5], 1), [0.5, 0.75]);
    assert_eq!(bounds(&[1.0, 0.0], 0), [0.5, 0.5]);
    assert_eq!(bounds(&[], 0), [0.0, 1.0]);
}

/// A score each, and lengths of both sides; in AlpacaEval's sign, base − policy.
const SCORES: [f64; 10] = [1.0, 0.5, 0.0, 1.0, 0.75, 0.0, 0.5, 1.0, 0.25, 0.0];
const BASE: [usize; 10] = [100, 220, 300, 150, 400, 260, 90, 310, 500, 120];
const POLICY: [usize; 10] = [180, 200, 150, 300, 500, 250, 95, 420, 480, 60];

#[test]
fn length_control_has_the_published_numbers() {
    let cases = [
        (0.0, -3.9957607, -0.4477423, 0.3898977),
        (0.01, -3.8057459, -0.4384261, 0.3921161),
        (1.0, -1.2145331, -0.1578982, 0.4606073),
    ];
    let clusters = Clusters::each(10);
    for (ridge, phi, theta, estimate) in cases {
        let fit = length_controlled(&SCORES, &POLICY, &BASE, &clusters, ridge, FEW).expect("there is one");
        close(fit.sd, 91.0448607, 5e-8);
        close(fit.phi, -phi, 5e-8);
        close(fit.theta, theta, 5e-8);
        close(fit.estimate, estimate, 5e-8);
        close(fit.explained, 0.5 - estimate, 1e-7);
    }
    let raw = FEW.share(&SCORES, &clusters);
    close(raw.estimate, 0.5, 0.0);
    close(raw.standard_error, 0.134371, 5e-7);
    // nothing to tell apart
    assert_eq!(length_controlled(&SCORES, &BASE, &BASE, &clusters, LENGTH_RIDGE, FEW), None);
}

#[test]
fn controlled_win_rates_are_scipys() {
    // scipy's minimum, found without gradients of ours, has about eight digits
    for case in fixture().length {
        let clusters = Clusters::each(case.scores.len());
        let fit = length_controlled(&case.scores, &case.policy, &case.against, &clusters, case.ridge, FEW)
            .expect("there is one");
        close(fit.theta, case.theta, 1e-6);
        close(fit.phi, case.phi, 1e-6);
    }
    for case in fixture().style {
        let clusters = Clusters::each(case.scores.len());
        let side = |rows: &[[usize; 4]]| {
            rows.iter()
                .map(|&[tokens, headers, lists, bold]| Style { tokens, headers, lists, bold })
                .collect::<Vec<_>>()
        };
        let (policy, against) = (side(&case.policy), side(&case.against));
        let fit =
            style_controlled(&case.scores, &policy, &against, &clusters, case.ridge, FEW).expect("there is one");
        close(fit.theta, case.theta, 1e-6);
        assert_eq!(fit.coefficients.len(), case.phi.len());
        fit.coefficients.iter().zip(case.phi).for_each(|(is, ought)| close(is.phi, ought, 1e-6));
    }
}

#[test]
fn markdown_is_counted_as_arena_hard_does() {
    for Markup { text, headers, lists, bold } in fixture().markup {
        assert_eq!(Style::of(&text, 3), Style { tokens: 3, headers, lists, bold }, "{text:?}");
    }
}

#[test]
fn a_win_rate_that_length_explains_is_one_half_at_equal_length() {
    // a judge that knows length only, and a policy that writes more: D.2 of the reasons behind this
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let mut uniform = || (rng.next_u32() as f64 + 0.5) / 2f64.powi(32);
    let (mut scores, mut policy, mut against) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..400 {
        let (base, more) = (200.0 + 400.0 * uniform(), 120.0 * (2.0 * uniform() - 0.4));
        against.push(base as usize);
        policy.push((base + more) as usize);
        scores.push(if uniform() < sigmoid(more / 40.0) { 1.0 } else { 0.0 });
    }
    let clusters = Clusters::each(scores.len());
    let raw = FEW.share(&scores, &clusters);
    assert!(raw.against(0.5).is_gt(), "{raw:?}");
    let fit = length_controlled(&scores, &policy, &against, &clusters, LENGTH_RIDGE, FEW).expect("there is one");
    assert!(fit.interval[0] < 0.5 && 0.5 < fit.interval[1], "{fit:?}");
    assert!(fit.phi_interval[0] > 0.0 && fit.explained > 0.05, "{fit:?}");
}

#[test]
fn one_sided_scores_have_finite_controlled_rates() {
    let clusters = Clusters::each(10);
    for won in [0.0, 1.0] {
        let fit = length_controlled(&[won; 10], &POLICY, &BASE, &clusters, LENGTH_RIDGE, FEW).expect("there is one");
        assert!((fit.estimate - won).abs() < 1e-6 && fit.theta.is_finite() && fit.phi.is_finite(), "{fit:?}");
    }
    // a judge that picks the longer answer, always: without a ridge there is no end either
    let longer: Vec<f64> = POLICY.iter().zip(BASE).map(|(&p, b)| f64::from(u8::from(p > b))).collect();
    for ridge in [0.0, LENGTH_RIDGE] {
        let fit = length_controlled(&longer, &POLICY, &BASE, &clusters, ridge, FEW).expect("there is one");
        assert!(fit.phi > 5.0 && fit.phi.is_finite() && fit.interval.iter().all(|x| x.is_finite()), "{fit:?}");
    }
}

#[test]
fn strengths_have_the_published_numbers() {
    let mut comparisons = Vec::new();
    for (one, other, won, lost) in [(0, 1, 30, 20), (0, 2, 40, 10), (1, 2, 33, 17)] {
        for i in 0..won + lost {
            comparisons.push(Comparison { one, other, score: f64::from(u8::from(i < won)), cluster: i });
        }
    }
    let ratings = bradley_terry(3, &comparisons, FEW).expect("there is one");
    for (rating, (beta, elo)) in ratings.iter().zip([(0.0, 0.0), (-0.4960222, -86.1679), (-1.2568068, -218.3297)]) {
        close(rating.beta, beta, 5e-8);
        close(rating.elo, elo, 5e-5);
        assert!(rating.elo_interval[0] <= rating.elo && rating.elo <= rating.elo_interval[1], "{rating:?}");
    }
    // who lost nothing has no finite strength, nor has who was not compared
    let lost_nothing = [Comparison { one: 0, other: 1, score: 1.0, cluster: 0 }];
    assert_eq!(bradley_terry(2, &lost_nothing, FEW), None);
    assert_eq!(bradley_terry(4, &comparisons, FEW), None);
}

#[test]
fn strengths_are_scipys_and_of_two_systems_the_win_rate() {
    for RankingCase { wins, beta } in fixture().ranking {
        let mut comparisons = Vec::new();
        for (one, row) in wins.iter().enumerate() {
            for (other, &won) in row.iter().enumerate().filter(|(other, _)| *other > one) {
                let all = won + wins[other][one];
                // as so many comparisons as there are, with one score: fractional wins in the same proportion
                let times = (all * 1000.0).round() as usize;
                comparisons.extend((0..times).map(|_| Comparison { one, other, score: won / all, cluster: 0 }));
            }
        }
        let ratings = bradley_terry(beta.len(), &comparisons, Bootstrap { draws: 1, seed: 0 }).expect("there is one");
        // the counts are rounded to a thousandth of one
        ratings.iter().zip(beta).for_each(|(rating, beta)| close(rating.beta, beta, 1e-4));
    }
    let two: Vec<_> = SCORES[..9]
        .iter()
        .enumerate()
        .map(|(cluster, &score)| Comparison { one: 1, other: 0, score, cluster })
        .collect();
    close(bradley_terry(2, &two, FEW).expect("there is one")[1].against_first, mean(&SCORES[..9]), 1e-12);
}

#[test]
fn judges_agree_as_scikit_learn_and_scipy_say() {
    for case in fixture().judges {
        let agreement = Agreement::of(&case.one, &case.other).expect("there is one");
        close(agreement.agreement, case.agreement, 1e-12);
        close(agreement.agreement_without_ties.expect("there is one"), case.agreement_without_ties, 1e-12);
        close(agreement.kappa.expect("there is one"), case.kappa, 1e-12);
        close(agreement.spearman.expect("there is one"), case.spearman, 1e-12);
    }
    assert_eq!(spearman(&[1.0, 1.0], &[0.0, 1.0]), None);
    assert_eq!(Agreement::of(&[], &[]), None);
}

#[test]
fn longer_counts_from_31_characters_on_and_without_ties() {
    let (policy, against) = ([131, 130, 50, 300, 10], [100, 100, 200, 100, 400]);
    // the second differs by 30, the fourth is a tie; of the others the longer one wins the first and the last
    let scores = [0.8, 1.0, 0.6, 0.5, 0.0];
    close(prefers_longer(&scores, &policy, &against).expect("there is one"), 2.0 / 3.0, 1e-12);
    assert_eq!(prefers_longer(&[0.5], &[500], &[10]), None);
    close(
        prefers_with(&[1.0, 0.0, 1.0], [true, true, true], [false, false, true]).expect("there is one"),
        0.5,
        1e-12,
    );
}

#[test]
fn quantiles_are_numpys() {
    let values = [1.0, 2.0, 4.0, 8.0];
    for (q, ought) in [(0.0, 1.0), (0.5, 3.0), (0.025, 1.075), (0.975, 7.7), (1.0, 8.0)] {
        close(quantile(&values, q), ought, 1e-12);
    }
    assert!(quantile(&[], 0.5).is_nan());
}

#[test]
fn prompts_that_all_say_the_same_have_an_interval_too() {
    for (score, low, high) in [(1.0, 0.838875, 1.0), (0.0, 0.0, 0.161125), (0.5, 0.419438, 0.580562)] {
        let estimate = FEW.share(&[score; 20], &Clusters::each(20));
        assert_eq!((estimate.estimate, estimate.method), (score, Method::Wilson));
        close(estimate.interval[0], low, 1e-6);
        close(estimate.interval[1], high, 1e-6);
    }
    // two clusters that say the same are two witnesses, however many prompts they have
    let estimate = FEW.share(&[1.0; 20], &Clusters::of((0..20).map(|i| i % 2)));
    close(estimate.interval[0], wilson(2, 2)[0], 1e-12);
    // but for what is no share nothing is known beyond the sample
    assert_eq!(FEW.mean(&[3.0; 4], &Clusters::each(4)).interval, [3.0; 2]);
    assert!(FEW.share(&[], &Clusters::each(0)).estimate.is_nan());
}

#[test]
fn clustered_prompts_have_wider_intervals() {
    // ten topics of ten prompts that agree within the topic: as much information as ten prompts
    let scores: Vec<f64> = (0..100).map(|i| f64::from(u8::from(i / 10 < 6))).collect();
    let apart = FEW.share(&scores, &Clusters::each(100));
    let together = FEW.share(&scores, &Clusters::of((0..100).map(|i| i / 10)));
    assert_eq!(apart.estimate, together.estimate);
    close(together.standard_error, (0.24f64 / 9.0).sqrt(), 1e-12);
    let width = |estimate: Estimate| estimate.interval[1] - estimate.interval[0];
    assert!(width(together) > 2.5 * width(apart));
}

#[test]
fn an_interval_of_95_percent_covers_95_percent() {
    // prompts with a quality each, and a judge with a position bias asked in both orders; the truth is ½ by symmetry
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let mut uniform = || (f64::from(rng.next_u32()) + 0.5) / 2f64.powi(32);
    let (repetitions, prompts) = (500, 120);
    let clusters = Clusters::each(prompts);
    let mut covered = 0;
    for seed in 0..repetitions {
        let scores: Vec<f64> = (0..prompts)
            .map(|_| {
                let quality = 5.0 * (uniform() - 0.5);
                let mut vote = |order: Order| {
                    let bias = if order == Order::PolicyFirst { 0.7 } else { -0.7 };
                    Some(f64::from(u8::from(uniform() < sigmoid(quality + bias))))
                };
                Votes { first: vote(Order::PolicyFirst), second: vote(Order::PolicySecond) }
                    .score()
                    .expect("there is one")
            })
            .collect();
        let [low, high] = Bootstrap { draws: 1000, seed }.share(&scores, &clusters).interval;
        covered += usize::from(low <= 0.5 && 0.5 <= high);
    }
    let coverage = covered as f64 / repetitions as f64;
    assert!((0.93..=0.97).contains(&coverage), "{coverage}");
}

#[test]
fn draws_depend_on_the_seed_and_nothing_else() {
    let clusters = Clusters::each(10);
    let of = |seed| Bootstrap { draws: 500, seed }.share(&SCORES, &clusters);
    assert_eq!(of(3), of(3));
    assert_ne!(of(3).interval, of(4).interval);
}

proptest! {
    /// What trades places gets the mirrored result, to the last digit that sums allow.
    #[test]
    fn trading_places_mirrors_everything(
        rows in prop::collection::vec((0u32..=4, 1usize..500, 1usize..500), 3..40),
        seed in 0u64..1000,
    ) {
        let scores: Vec<f64> = rows.iter().map(|row| f64::from(row.0) / 4.0).collect();
        let turned: Vec<f64> = scores.iter().map(|s| 1.0 - s).collect();
        let policy: Vec<usize> = rows.iter().map(|row| row.1).collect();
        let against: Vec<usize> = rows.iter().map(|row| row.2).collect();
        let clusters = Clusters::each(rows.len());
        let bootstrap = Bootstrap { draws: 50, seed };
        let (one, other) = (bootstrap.share(&scores, &clusters), bootstrap.share(&turned, &clusters));
        prop_assert!((one.estimate - (1.0 - other.estimate)).abs() < 1e-12);
        prop_assert!((one.standard_error - other.standard_error).abs() < 1e-12);
        prop_assert!((one.interval[0] - (1.0 - other.interval[1])).abs() < 1e-12);
        prop_assert!((one.interval[1] - (1.0 - other.interval[0])).abs() < 1e-12);
        prop_assert!(one.interval[0] <= one.interval[1] && one.interval[0] >= 0.0 && one.interval[1] <= 1.0);
        let fit = |scores: &[f64], policy: &[usize], against: &[usize]| {
            length_controlled(scores, policy, against, &clusters, LENGTH_RIDGE, bootstrap)
        };
        match (fit(&scores, &policy, &against), fit(&turned, &against, &policy)) {
            (Some(one), Some(other)) => {
                // rates, not logits: θ has no end where all scores are the same
                prop_assert!((one.estimate - (1.0 - other.estimate)).abs() < 1e-6, "{one:?} {other:?}");
                prop_assert!((one.phi - other.phi).abs() < 1e-4 * (1.0 + one.phi.abs()), "{one:?} {other:?}");
                prop_assert!((one.interval[0] - (1.0 - other.interval[1])).abs() < 1e-6, "{one:?} {other:?}");
            }
            (None, None) => {}
            (one, other) => prop_assert!(false, "{one:?} {other:?}"),
        }
    }

    #[test]
    fn a_p_value_is_a_probability(wins in 0usize..100_000, losses in 0usize..100_000) {
        let p = sign_test(wins, losses);
        prop_assert!((0.0..=1.0).contains(&p));
        prop_assert_eq!(p, sign_test(losses, wins));
    }
}
