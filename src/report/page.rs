//! `report.html`: one file that needs nothing else, made of what a run folder says.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, UndefinedBehavior};
use serde::Serialize;
use serde_json::Value;

use super::chart::{Chart, Mark, histogram};
use super::checks::{Check, checks};
use super::curves::{self, PANELS};
use super::drawing::{Anchor, Drawing, Ink, Item, Theme};
use super::run::{BeforeAfter, EvalCheck, EvalFile, Judged, Margins, Run, Sample, State, WinRate};
use super::ticks::{interval, number, percent, tenths};
use crate::bytes;
use crate::eval::{Level, health};
use crate::progress::{duration, thousands};
use crate::statistics::{mean, wilson};

/// A picture in a page: markup of our own, with its texts escaped already.
type Svg = minijinja::Value;

/// Everything that the template shows, as text.
#[derive(Serialize)]
struct Page<'r> {
    name: &'r str,
    state: String,
    state_class: &'static str,
    facts: Vec<String>,
    verdict: Verdict,
    alerts: Vec<&'r Check>,
    passed: Vec<&'r Check>,
    tiles: Vec<Tile>,
    held_out: Vec<[String; 3]>,
    margins: Vec<Picture>,
    win_rates: Vec<WinRateView<'r>>,
    eval: Option<EvalView>,
    samples: &'r [Sample],
    curves: Vec<Picture>,
    smoothing: String,
    data: Vec<[String; 3]>,
    about: Vec<[String; 2]>,
    hashes: Vec<[String; 2]>,
    recipe: &'r str,
    unreadable: &'r [String],
}

/// A drawing with its heading and what to look for.
#[derive(Serialize)]
pub(super) struct Picture {
    pub(super) title: String,
    pub(super) note: String,
    pub(super) svg: Svg,
}

impl Picture {
    pub(super) fn new(title: impl Into<String>, note: impl Into<String>, drawing: &Drawing) -> Self {
        Self { title: title.into(), note: note.into(), svg: safe(drawing) }
    }
}

/// The answer to "is it better, and is something wrong?".
#[derive(Debug, Serialize)]
struct Verdict {
    level: Level,
    headline: String,
    sentence: String,
}

#[derive(Serialize)]
struct Tile {
    label: &'static str,
    value: String,
    detail: String,
}

#[derive(Serialize)]
struct WinRateView<'r> {
    win_rate: &'r WinRate,
    policy: &'r str,
    judge: String,
    estimate: String,
    health: Option<Looked>,
    estimates: Svg,
    counts: Svg,
    categories: Vec<[String; 3]>,
    orders: Vec<(&'static str, Vec<String>)>,
    order_facts: Vec<[String; 2]>,
    lengths: Vec<[String; 3]>,
    scatter: Option<Svg>,
    groups: Vec<Group<'r>>,
    left_out: usize,
}

/// Judged samples of one outcome.
#[derive(Serialize)]
struct Group<'r> {
    title: String,
    samples: Vec<&'r Judged>,
}

/// A value beside what is usual, in words.
#[derive(Serialize)]
struct Looked {
    name: String,
    value: String,
    healthy: String,
    verdict: String,
    why: String,
}

#[derive(Serialize)]
struct EvalView {
    facts: Vec<[String; 2]>,
    checks: Vec<Looked>,
    choices: Vec<[String; 5]>,
}

/// Renders the report of a run.
///
/// # Errors
/// The template engine's.
pub fn render(run: &Run) -> Result<String, minijinja::Error> {
    let found = checks(run);
    let (passed, alerts) = found.iter().partition(|check| check.level == Level::Good);
    let total = run.total_steps();
    let of = match (run.history.step(), total) {
        (step, Some(total)) => format!("update {} of {}", thousands(step as usize), thousands(total as usize)),
        (step, None) => format!("update {}", thousands(step as usize)),
    };
    let (state, state_class) = match run.state {
        State::Finished => ("finished".to_owned(), "finished"),
        State::Running => (format!("running, {of}"), "running"),
        State::Unfinished => (format!("not finished, {of}"), "unfinished"),
    };
    let total = total.filter(|_| run.state != State::Finished);
    let picture = |panel: &curves::Panel| {
        let chart = panel.chart(&run.history, total)?;
        Some(Picture::new(panel.title, panel.note, &chart.draw()))
    };
    let updates = run.history.get("loss").len();
    let page = Page {
        name: &run.name,
        state,
        state_class,
        facts: facts(run),
        verdict: verdict(run, &found),
        alerts,
        passed,
        tiles: tiles(run),
        held_out: held_out(run),
        margins: margins(&run.margins),
        win_rates: run.win_rates.iter().map(WinRateView::new).collect(),
        eval: run.eval.as_ref().map(EvalView::new),
        samples: &run.samples,
        curves: PANELS.iter().filter_map(picture).collect(),
        smoothing: match curves::window(updates) {
            Some(window) => format!("smoothed over about {window} updates, the thin line is each of them"),
            None => "each update".into(),
        },
        data: data(&run.summary),
        about: about(run),
        hashes: hashes(&run.summary),
        recipe: &run.recipe_text,
        unreadable: &run.unreadable,
    };
    fill("report.html", &page)
}

/// Charts in a page of their own, each with a note.
///
/// # Errors
/// The template engine's.
pub fn pictures(title: &str, lead: &str, charts: &[(Chart, String)]) -> Result<String, minijinja::Error> {
    #[derive(Serialize)]
    struct Pictures<'p> {
        title: &'p str,
        lead: &'p str,
        pictures: Vec<Picture>,
    }
    let picture = |(chart, note): &(Chart, String)| Picture::new(chart.title.clone(), note.clone(), &chart.draw());
    fill("pictures.html", &Pictures { title, lead, pictures: charts.iter().map(picture).collect() })
}

/// Fills one of the templates. What is put into them is escaped, unless it is a drawing of our own.
pub(super) fn fill(name: &str, page: &impl Serialize) -> Result<String, minijinja::Error> {
    let mut templates = Environment::new();
    templates.set_auto_escape_callback(|_| AutoEscape::Html);
    templates.set_undefined_behavior(UndefinedBehavior::Strict);
    templates.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    templates.add_template("report.html", include_str!("report.html"))?;
    templates.add_template("compare.html", include_str!("compare.html"))?;
    templates.add_template("pictures.html", include_str!("pictures.html"))?;
    templates.add_template("head.html", include_str!("head.html"))?;
    templates.add_global("style", minijinja::Value::from_safe_string(include_str!("style.css").to_owned()));
    templates.get_template(name)?.render(minijinja::Value::from(Serde(page)))
}

fn text_at(value: &Value, path: &str) -> Option<String> {
    value.pointer(path)?.as_str().map(str::to_owned)
}

fn count_at(value: &Value, path: &str) -> Option<usize> {
    value.pointer(path)?.as_u64().map(|count| count as usize)
}

/// The line below the title.
fn facts(run: &Run) -> Vec<String> {
    let mut facts = Vec::new();
    if let Some(recipe) = &run.recipe {
        let beta = recipe.loss.beta().map_or(String::new(), |beta| format!(", beta {beta}"));
        facts.push(format!("{}{beta}", recipe.loss.name().to_uppercase()));
        let source = &recipe.model.source;
        let short = match source.is_absolute() {
            // the last two parts of a path say enough
            true => source.components().rev().take(2).collect::<Vec<_>>().into_iter().rev().collect(),
            false => source.clone(),
        };
        facts.push(format!("on {}", short.display()));
        if let Some(rank) = recipe.adapter.rank {
            facts.push(format!("rank {}", rank.get()));
        }
    }
    if let Some(examples) = count_at(&run.summary, "/data/train/facts/examples") {
        facts.push(format!("{} training examples", thousands(examples)));
    }
    if let Some(steps) = count_at(&run.summary, "/steps") {
        facts.push(format!("{} updates", thousands(steps)));
    }
    if let Some(seconds) = run.summary.get("seconds").and_then(Value::as_f64) {
        facts.push(duration(seconds));
    }
    facts
}

/// How many held-out pairs there were.
fn pairs(run: &Run) -> Option<usize> {
    let counted = |side: &[Option<f32>]| Some(side.iter().flatten().count()).filter(|&n| n > 0);
    counted(&run.margins.logps.after)
        .or_else(|| counted(&run.margins.logps.before))
        .or_else(|| count_at(&run.summary, "/data/eval/facts/examples"))
}

/// What the evidence says: a judge's verdict first, then held-out pairs, then the loss.
fn evidence(run: &Run) -> (Level, String, String) {
    // whether it is better than before is what is asked; what has a verdict says more than what has none, and a model that
    // judges more than a formula
    let against_base = run.own_win_rates().filter(|win_rate| win_rate.is_against_base());
    let judged = against_base.min_by_key(|win_rate| (!win_rate.is_known(), win_rate.judge.kind != "endpoint"));
    if let Some(WinRate { win_rate, judge, prompts, .. }) = judged {
        let prompts = thousands(*prompts as usize);
        if !win_rate.estimate.is_finite() {
            let sentence = format!("None of {prompts} prompts has a verdict of {}.", judge.name);
            return (Level::Watch, "No verdict.".to_owned(), sentence);
        }
        let (level, headline) = match win_rate.interval {
            Some([low, _]) if low > 0.5 => (Level::Good, "Better than the base."),
            Some([_, high]) if high < 0.5 => (Level::Bad, "Worse than the base."),
            _ => (Level::Watch, "No clear difference to the base."),
        };
        let sentence = format!(
            "Its answers win {} of {prompts} prompts{}, judged by {}{}.",
            tenths(win_rate.estimate),
            win_rate.interval.map_or(String::new(), |both| format!(" (95 % interval {})", interval(both))),
            judge.name,
            if judge.measures.is_empty() { String::new() } else { format!(", which measures {}", judge.measures) },
        );
        return (level, headline.to_owned(), sentence);
    }
    let (before, after) = run.history.before_and_after("rewards/accuracies");
    if let (Some(accuracy), Some(pairs)) = (after.filter(|_| before.is_some()), pairs(run)) {
        let both = wilson((accuracy * pairs as f64).round() as usize, pairs);
        let (level, headline) = match both {
            [low, _] if low > 0.5 => (Level::Good, "It learned the preference."),
            [_, high] if high < 0.5 => (Level::Bad, "It learned the opposite of the preference."),
            _ => (Level::Watch, "Whether it learned the preference is not clear."),
        };
        // the reward counts from the reference; only where that is the start is it a movement
        let what = if run.history.starts_at_reference() { "it moved towards" } else { "its reward is higher for" };
        let sentence = format!(
            "On {} of {} held-out pairs {what} the chosen answer (95 % interval {}). Whether what it writes itself is better, dpo-lora \
             win-rate tells.",
            percent(accuracy),
            thousands(pairs),
            interval(both)
        );
        return (level, headline.to_owned(), sentence);
    }
    match run.history.before_and_after("loss") {
        (Some(before), Some(after)) => {
            let (level, headline) = match after < before {
                true => (Level::Good, "The held-out loss fell."),
                false => (Level::Bad, "The held-out loss did not fall."),
            };
            (level, headline.to_owned(), format!("From {} to {}.", number(before), number(after)))
        }
        (Some(_), None) => (
            Level::Watch,
            "Nothing is known yet.".to_owned(),
            "Held-out examples were measured once, before the first update.".to_owned(),
        ),
        _ => (
            Level::Watch,
            "Nothing was held out.".to_owned(),
            "So nothing here tells whether what was learned carries over: name held-out rows as [data] eval."
                .to_owned(),
        ),
    }
}

fn verdict(run: &Run, checks: &[Check]) -> Verdict {
    let (level, headline, sentence) = evidence(run);
    // those of an evaluation are shown with it, and count here
    let evaluated = run.eval.iter().flat_map(|eval| &eval.checks).map(|check| match check.verdict.as_str() {
        "bad" => Level::Bad,
        "watch" => Level::Watch,
        _ => Level::Good,
    });
    let levels: Vec<Level> = checks.iter().map(|check| check.level).chain(evaluated).collect();
    let count = |wanted: Level| levels.iter().filter(|level| **level == wanted).count();
    let things =
        |n: usize, what: &str| if n == 1 { format!("1 thing {what}s") } else { format!("{n} things {what}") };
    let look = match (count(Level::Bad), count(Level::Watch)) {
        (0, 0) if levels.is_empty() => String::new(),
        (0, 0) => " Nothing looks wrong.".to_owned(),
        (0, watch) => format!(" {}: see below.", things(watch, "deserve") + " a look"),
        (bad, 0) => format!(" {}: see below.", things(bad, "look") + " wrong"),
        (bad, watch) => format!(" {}, {watch} more to look at: see below.", things(bad, "look") + " wrong"),
    };
    let headline =
        if run.state == State::Finished { headline } else { format!("So far: {}", lower_first(&headline)) };
    let worst = levels.iter().copied().max().unwrap_or(Level::Good);
    Verdict { level: level.max(worst), headline, sentence: sentence + &look }
}

fn lower_first(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or(String::new(), |first| first.to_lowercase().chain(chars).collect())
}

/// The few numbers that stand on top.
fn tiles(run: &Run) -> Vec<Tile> {
    let mut tiles = Vec::new();
    for WinRate { win_rate, judge, against, .. } in run.own_win_rates().take(2) {
        tiles.push(Tile {
            label: "Win rate",
            value: tenths(win_rate.estimate),
            detail: format!(
                "against {against}, {}{}",
                win_rate.interval.map_or(String::new(), |both| interval(both) + ", "),
                judge.name
            ),
        });
    }
    let at_reference = run.history.starts_at_reference();
    let mut add = |metric: &str, label: &'static str, show: fn(f64) -> String| {
        if let (before, Some(after)) = run.history.before_and_after(metric) {
            let detail = match before {
                Some(_) if at_reference && metric == "rewards/accuracies" => "chance is 50 %".to_owned(),
                Some(before) => format!("before {}", show(before)),
                None => String::new(),
            };
            tiles.push(Tile { label, value: show(after), detail });
        }
    };
    add("rewards/accuracies", "Reward accuracy", percent);
    add("logps/accuracies", "Chosen is likelier", percent);
    add("rewards/margins", "Reward margin", number);
    add("loss", "Held-out loss", number);
    tiles.truncate(4);
    tiles
}

/// A held-out metric, what it is called, how it is written, and whether more is better, where one direction is.
pub(super) type Row = (&'static str, &'static str, fn(f64) -> String, Option<bool>);

/// The held-out metrics of the table.
pub(super) const ROWS: [Row; 9] = [
    ("rewards/accuracies", "Reward accuracy", percent, Some(true)),
    ("rewards/margins", "Reward margin", number, None),
    ("logps/accuracies", "Chosen answer is the likelier one", percent, Some(true)),
    ("loss", "Loss", number, None),
    ("logps/chosen", "Log-prob of the chosen answer", number, Some(true)),
    ("logps/rejected", "Log-prob of the rejected answer", number, None),
    ("perplexity", "Perplexity of chosen answers", number, Some(false)),
    ("mean_token_accuracy", "Chosen tokens that are the most probable", percent, Some(true)),
    ("kl_to_reference", "Distance from the reference, nats a token", number, None),
];

/// Name, before, after.
fn held_out(run: &Run) -> Vec<[String; 3]> {
    let at_reference = run.history.starts_at_reference();
    let row = |(metric, label, show, _): Row| match run.history.before_and_after(metric) {
        (None, None) => None,
        (before, after) => {
            // a base that is its own reference has no accuracy
            let before = before.filter(|_| !(at_reference && metric == "rewards/accuracies"));
            let [before, after] = [before, after].map(|value| value.map_or("—".into(), show));
            Some([label.to_owned(), before, after])
        }
    };
    ROWS.into_iter().filter_map(row).collect()
}

/// Histograms of the pairs before and after.
fn margins(margins: &Margins) -> Vec<Picture> {
    let values = |side: &[Option<f32>]| side.iter().flatten().map(|&value| f64::from(value)).collect::<Vec<f64>>();
    let mut pictures = Vec::new();
    let mut add = |BeforeAfter { before, after }: &BeforeAfter, title: &str, unit: &str, note: &str| {
        let (before, after) = (values(before), values(after));
        if after.is_empty() {
            return;
        }
        // a policy that is the reference has no margin at all: a bar as high as everything would hide the rest
        let before = if before.iter().all(|margin| *margin == 0.0) { Vec::new() } else { before };
        let bins = histogram(&[&before, &after], 24);
        let mut chart = Chart::new(title, unit, "pairs");
        chart.y.include = vec![0.0];
        chart.x.include = vec![0.0];
        let bars = |bars: &[(f64, f64, f64)], ink, opacity, label: &str| Mark::Bars {
            bars: bars.to_vec(),
            ink,
            opacity,
            label: label.to_owned(),
        };
        if !before.is_empty() {
            chart.marks.push(bars(&bins[0], Ink::Muted, 0.45, "before"));
        }
        chart.marks.push(bars(&bins[1], Ink::Series(0), 0.65, if before.is_empty() { "" } else { "after" }));
        chart.marks.push(Mark::RuleX(0.0));
        pictures.push(Picture::new(title, note, &chart.draw()));
    };
    add(
        &margins.logps,
        "Which answer is the likelier one",
        "log π(chosen) − log π(rejected), nats",
        "A held-out pair right of zero has the chosen answer as the likelier one. The whole heap should move to the right.",
    );
    add(
        &margins.rewards,
        "Reward margins",
        "reward of chosen − reward of rejected",
        "A held-out pair right of zero counts as right in the reward accuracy. At the start, when policy and reference are \
         the same, all margins are zero.",
    );
    pictures
}

impl<'r> WinRateView<'r> {
    fn new(win_rate: &'r WinRate) -> Self {
        let WinRate { judge, orders, lengths, .. } = win_rate;
        let share = |value: Option<f64>| value.map_or("—".to_owned(), percent);
        let table = orders.as_ref().map_or(&[][..], |orders| &orders.table);
        let rows = ["won", "lost", "tied"].into_iter().zip(table);
        let order_facts = orders.as_ref().map_or(Vec::new(), |orders| {
            vec![
                ["Same verdict in both orders".to_owned(), share(orders.agreement)],
                ["Cohen's κ".to_owned(), orders.kappa.map_or("—".into(), number)],
                ["Winner changes with the order".to_owned(), share(orders.flip_rate)],
                ["Verdicts for the first answer".to_owned(), share(orders.first_slot_share)],
            ]
        });
        let two = |label: &str, policy: Option<f64>, against: Option<f64>, show: fn(f64) -> String| {
            let known = policy.is_some() || against.is_some();
            let [policy, against] = [policy, against].map(|value| value.map_or("—".to_owned(), show));
            known.then(|| [label.to_owned(), policy, against])
        };
        let length_rows = [
            two("Characters an answer", lengths.policy_chars, lengths.against_chars, number),
            two("Tokens an answer", lengths.policy_tokens, lengths.against_tokens, number),
            two("Cut off at the limit", lengths.policy_truncated, lengths.against_truncated, percent),
        ];
        let (groups, left_out) = groups(&win_rate.samples);
        let health = win_rate.win_rate.interval.filter(|_| win_rate.is_against_base()).map(|interval| {
            let found = health::win_rate(win_rate.win_rate.estimate, interval);
            Looked {
                name: found.name,
                value: tenths(found.value),
                healthy: found.healthy,
                verdict: found.verdict.word().to_owned(),
                why: found.why,
            }
        });
        Self {
            win_rate,
            policy: if win_rate.policy.is_empty() { "policy" } else { &win_rate.policy },
            health,
            judge: match judge.measures.is_empty() {
                true => judge.name.clone(),
                false => format!("{} ({})", judge.name, judge.measures),
            },
            estimate: tenths(win_rate.win_rate.estimate),
            estimates: safe(&estimates(win_rate)),
            counts: safe(&counts(win_rate)),
            categories: win_rate
                .categories
                .iter()
                .map(|category| {
                    let error = category.standard_error.map_or(String::new(), |se| format!(" ± {:.1}", 100.0 * se));
                    let rate = tenths(category.estimate) + &error;
                    [category.category.clone(), category.prompts.to_string(), rate]
                })
                .collect(),
            orders: rows.map(|(name, row)| (name, row.iter().map(|n| count(*n)).collect())).collect(),
            order_facts,
            lengths: length_rows.into_iter().flatten().collect(),
            scatter: scatter(&win_rate.samples).map(|chart| safe(&chart.draw())),
            groups,
            left_out,
        }
    }
}

fn safe(drawing: &Drawing) -> Svg {
    minijinja::Value::from_safe_string(drawing.svg(Theme::Page))
}

/// How many prompts; a share of one where a table counts such.
fn count(value: f64) -> String {
    if value.fract() == 0.0 && value >= 0.0 { thousands(value as usize) } else { number(value) }
}

/// The win rate, and the length-controlled one, as points with their intervals on a scale from 0 to 100 %.
fn estimates(win_rate: &WinRate) -> Drawing {
    let mut rows = vec![("win rate", &win_rate.win_rate)];
    rows.extend(win_rate.length_controlled.as_ref().map(|controlled| ("at equal length", controlled)));
    let (left, right, line) = (110.0, 466.0, 30.0);
    let bottom = 10.0 + line * rows.len() as f64;
    let mut drawing = Drawing::new(480.0, bottom + 24.0, format!("Win rate: {}", win_rate.headline));
    let x = |share: f64| left + (right - left) * share.clamp(0.0, 1.0);
    for (share, label) in [(0.0, "0"), (0.25, "25"), (0.5, "50"), (0.75, "75"), (1.0, "100 %")] {
        drawing.line(
            vec![(x(share), 6.0), (x(share), bottom)],
            if share == 0.5 { Ink::Muted } else { Ink::Grid },
            1.0,
        );
        drawing.text((x(share), bottom + 16.0), Anchor::Middle, label, 12.0, Ink::Muted);
    }
    for (i, (label, estimate)) in rows.into_iter().enumerate() {
        let y = 10.0 + line * (i as f64 + 0.5);
        drawing.text((left - 12.0, y + 4.0), Anchor::End, label, 12.0, Ink::Text);
        let ink = match estimate.interval {
            Some([low, _]) if low > 0.5 => Ink::Good,
            Some([_, high]) if high < 0.5 => Ink::Bad,
            _ => Ink::Text,
        };
        if let Some([low, high]) = estimate.interval {
            drawing.line(vec![(x(low), y), (x(high), y)], ink, 5.0);
        }
        if !estimate.estimate.is_finite() {
            continue;
        }
        let (at, note) = ((x(estimate.estimate), y), tenths(estimate.estimate));
        drawing.items.push(Item::Circle { at, radius: 5.5, stroke: ink, fill: Ink::Ground, opacity: 1.0, note });
    }
    drawing
}

/// Wins, ties and losses as parts of one bar.
fn counts(win_rate: &WinRate) -> Drawing {
    let WinRate { wins, ties, losses, .. } = win_rate;
    let parts = [("won", *wins, Ink::Good), ("tied", *ties, Ink::Muted), ("lost", *losses, Ink::Bad)];
    let all = (wins + ties + losses).max(1) as f64;
    let mut drawing = Drawing::new(480.0, 48.0, format!("{wins} won, {ties} tied, {losses} lost"));
    let (left, right) = (0.0, 480.0);
    let (mut x, mut free) = (left, left);
    for (label, count, ink) in parts.into_iter().filter(|part| part.1 > 0) {
        let end = x + (right - left) * count as f64 / all;
        drawing.rectangle((x, 4.0), (end - 2.0, 24.0), ink, 0.8);
        // a label that has no room above its own part moves to the right
        let text = format!("{} {label}", thousands(count as usize));
        let width = super::drawing::text_width(&text, 12.0);
        let at = x.max(free).min(right - width);
        drawing.text((at, 41.0), Anchor::Start, &text, 12.0, ink);
        (x, free) = (end, at + width + 10.0);
    }
    drawing
}

/// Score against how much longer the policy's answer is.
fn scatter(samples: &[Judged]) -> Option<Chart> {
    let length = |text: &str| text.trim().chars().count() as f64;
    let mut points: Vec<(f64, f64)> = samples
        .iter()
        .filter_map(|sample| Some((length(&sample.policy) - length(&sample.against), sample.score?)))
        .collect();
    if points.len() < 10 {
        return None;
    }
    let mut chart =
        Chart::new("Does length decide?", "characters that the policy's answer is longer", "won (1) or lost (0)");
    chart.y.include = vec![-0.06, 1.06];
    // scores have few values: points of one value are spread a little, always the same way
    let spread = |i: usize| ((i * 37 % 17) as f64 / 16.0 - 0.5) * 0.09;
    let spread_points = points.iter().enumerate().map(|(i, (x, y))| (*x, y + spread(i))).collect();
    chart.marks.push(Mark::RuleY(0.5));
    chart.marks.push(Mark::RuleX(0.0));
    chart.marks.push(Mark::Points {
        points: spread_points,
        ink: Ink::Series(0),
        radius: 2.5,
        filled: true,
        opacity: 0.45,
        label: String::new(),
    });
    if points.len() >= 30 {
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let middle = |fifth: &[(f64, f64)]| {
            let (x, y): (Vec<f64>, Vec<f64>) = fifth.iter().copied().unzip();
            (mean(&x), mean(&y))
        };
        let means: Vec<(f64, f64)> = points.chunks(points.len().div_ceil(5)).map(middle).collect();
        let label = "mean".to_owned();
        chart.marks.push(Mark::Line { points: means, ink: Ink::Text, width: 2.0, opacity: 1.0, label });
    }
    Some(chart)
}

/// As many judged samples are shown of each outcome: 200 of all.
const SHOWN: [usize; 3] = [80, 80, 40];

/// Lost, won and tied samples, the clearest first, and how many are left out.
fn groups(samples: &[Judged]) -> (Vec<Group<'_>>, usize) {
    type Outcome = (&'static str, fn(f64) -> bool);
    let outcomes: [Outcome; 3] =
        [("Lost", |score| score < 0.5), ("Won", |score| score > 0.5), ("Tied", |score| score == 0.5)];
    let mut groups = Vec::new();
    let mut left_out = 0;
    for ((title, belongs), most) in outcomes.into_iter().zip(SHOWN) {
        let mut samples: Vec<&Judged> = samples.iter().filter(|sample| sample.score.is_some_and(belongs)).collect();
        let clearness = |sample: &Judged| sample.score.map_or(0.0, |score| (score - 0.5).abs());
        samples.sort_by(|a, b| clearness(b).total_cmp(&clearness(a)));
        left_out += samples.len().saturating_sub(most);
        let shown = if samples.len() > most { format!(", {most} shown") } else { String::new() };
        let title = format!("{title}: {}{shown}", thousands(samples.len()));
        samples.truncate(most);
        if !samples.is_empty() {
            groups.push(Group { title, samples });
        }
    }
    (groups, left_out)
}

impl EvalView {
    fn new(eval: &EvalFile) -> Self {
        let mut facts = Vec::new();
        if eval.pairs > 0 {
            facts.push(["Pairs".to_owned(), thousands(eval.pairs as usize)]);
        }
        for (name, value) in &eval.policy {
            if let (Some(policy), base) = (value.as_f64(), eval.base.get(name).and_then(Value::as_f64)) {
                let base = base.map_or(String::new(), |base| format!(" (base {})", number(base)));
                facts.push([name.clone(), format!("{}{base}", number(policy))]);
            }
        }
        if let Some(kl) = &eval.kl {
            let value = |value: Option<f64>| value.map_or("—".into(), number);
            let text = format!("{} nats a token, {} an answer", value(kl.per_token), value(kl.total));
            facts.push(["KL(policy ‖ base) on the policy's answers".to_owned(), text]);
        }
        let choices = eval.choices.iter().map(|file| {
            let error = file.standard_error.map_or(String::new(), |se| format!(" ± {:.1}", 100.0 * se));
            let difference = format!("{:+.1}{error}", 100.0 * file.difference);
            [
                format!("{} ({} questions)", file.file, thousands(file.questions as usize)),
                percent(file.base),
                percent(file.policy),
                difference.replacen('-', "−", 1),
                file.mcnemar.map_or("—".into(), number),
            ]
        });
        let looked = |check: &EvalCheck| Looked {
            name: check.name.clone(),
            value: check.value.map_or("—".into(), number),
            healthy: check.healthy.clone(),
            verdict: check.verdict.clone(),
            why: check.why.clone(),
        };
        Self { facts, checks: eval.checks.iter().map(looked).collect(), choices: choices.collect() }
    }
}

/// Label, training, held out.
fn data(summary: &Value) -> Vec<[String; 3]> {
    let sides = ["/data/train", "/data/eval"];
    if sides.iter().all(|side| summary.pointer(side).is_none()) {
        return Vec::new();
    }
    let mut rows: Vec<[String; 3]> = Vec::new();
    let mut add = |label: &str, of: &dyn Fn(&Value) -> Option<String>| {
        let values = sides.map(|side| summary.pointer(side).and_then(of));
        if values.iter().any(Option::is_some) {
            let [train, eval] = values.map(|value| value.unwrap_or_else(|| "—".into()));
            rows.push([label.to_owned(), train, eval]);
        }
    };
    let count = |path: &'static str| move |side: &Value| count_at(side, path).map(thousands);
    let tokens = |path: &'static str| move |side: &Value| side.pointer(path)?.as_f64().map(number);
    add("Files", &count("/facts/files"));
    add("Rows", &count("/facts/rows"));
    add("Examples", &count("/facts/examples"));
    add("Left out", &|side| {
        let dropped = side.get("dropped")?.as_object()?;
        let reasons: Vec<String> = dropped
            .iter()
            .map(|(reason, n)| {
                format!("{} {}", thousands(n.as_u64().unwrap_or(0) as usize), reason.replace('_', " "))
            })
            .collect();
        Some(if reasons.is_empty() { "none".to_owned() } else { reasons.join(", ") })
    });
    add("Cut at the longest length", &count("/facts/truncated"));
    add("Prompt tokens, mean", &tokens("/facts/mean_prompt"));
    add("Completion tokens, mean", &tokens("/facts/mean_completion"));
    add("Longest example, tokens", &count("/facts/longest"));
    add("Row shape", &|side| {
        let shapes = side.pointer("/facts/shapes")?.as_array()?;
        Some(shapes.iter().filter_map(Value::as_str).collect::<Vec<_>>().join("; "))
    });
    rows
}

/// What the run was and took.
fn about(run: &Run) -> Vec<[String; 2]> {
    let summary = &run.summary;
    let size = |path: &str| count_at(summary, path).map(bytes::shown);
    let memory = size("/peak_memory_bytes").map(|peak| match size("/expected_memory_bytes") {
        Some(expected) => format!("{peak} at most, {expected} expected"),
        None => peak,
    });
    let parameters = count_at(summary, "/parameters/base").map(|base| {
        let trainable = count_at(summary, "/parameters/trainable").unwrap_or(0);
        let share = tenths(trainable as f64 / base.max(1) as f64);
        format!("{}, {} trainable ({share})", thousands(base), thousands(trainable))
    });
    let speed = count_at(summary, "/num_tokens").zip(summary.get("seconds").and_then(Value::as_f64));
    let rows = [
        ("Base", text_at(summary, "/model")),
        ("Parameters", parameters),
        ("Time", summary.get("seconds").and_then(Value::as_f64).map(duration)),
        ("Ended", text_at(summary, "/ended")),
        ("Training tokens", speed.map(|(tokens, _)| thousands(tokens))),
        ("Memory", memory),
        ("Processor", text_at(summary, "/environment/cpu")),
        ("Threads", count_at(summary, "/environment/threads").map(thousands)),
        ("Machine's memory", size("/environment/memory_bytes")),
        ("System", text_at(summary, "/environment/system")),
        ("dpo-lora", text_at(summary, "/version")),
    ];
    rows.into_iter().filter_map(|(label, value)| Some([label.to_owned(), value?])).collect()
}

fn hashes(summary: &Value) -> Vec<[String; 2]> {
    let hashes = summary.get("hashes").and_then(Value::as_object);
    let known =
        hashes.into_iter().flatten().filter_map(|(name, hash)| Some([name.clone(), hash.as_str()?.to_owned()]));
    known.collect()
}

#[cfg(test)]
mod tests {
    use super::super::checks::tests::run;
    use super::super::run::{Category, Choices, Divergence, Estimate, Judge, Lengths, Orders, Verdict};
    use super::*;

    const EVIL: &str = "</pre></style><script>alert('x')</script><img src=x onerror=\"y\">{{ 7 * 7 }}";

    fn judged(score: f64) -> Judged {
        Judged {
            prompt: EVIL.into(),
            policy: format!("{EVIL} policy"),
            against: EVIL.into(),
            score: Some(score),
            category: Some(EVIL.into()),
            verdicts: vec![Verdict { order: 1, verdict: EVIL.into(), reason: Some(EVIL.into()) }],
        }
    }

    fn win_rate(estimate: f64, interval: [f64; 2]) -> WinRate {
        WinRate {
            folder: "base-by-judge".into(),
            headline: EVIL.into(),
            against: "base".into(),
            judge: Judge { kind: "endpoint".into(), name: "a judge".into(), measures: EVIL.into() },
            prompts: 300,
            wins: 180,
            ties: 20,
            losses: 100,
            invalid: 3,
            win_rate: Estimate { estimate, interval: Some(interval) },
            length_controlled: Some(Estimate { estimate: 0.5, interval: None }),
            orders: Some(Orders {
                table: vec![vec![41.0, 6.0, 3.0], vec![8.0, 30.0, 2.0], vec![3.0, 2.0, 5.0]],
                agreement: Some(0.76),
                ..Orders::default()
            }),
            lengths: Lengths { policy_chars: Some(100.0), against_chars: Some(90.0), ..Lengths::default() },
            categories: vec![Category {
                category: EVIL.into(),
                prompts: 3,
                estimate: 0.5,
                standard_error: Some(0.1),
            }],
            warnings: vec![EVIL.into()],
            samples: (0..300).map(|i| judged([0.0, 0.5, 1.0, 1.0][i % 4])).collect(),
            ..WinRate::default()
        }
    }

    /// A run with everything that a report can show, all of it hostile.
    fn full() -> Run {
        let mut run = run(|_, _, value| value);
        run.name = EVIL.into();
        run.recipe_text = EVIL.into();
        run.samples[0].prompt = EVIL.into();
        run.unreadable = vec![EVIL.into()];
        run.win_rates = vec![win_rate(0.62, [0.57, 0.67])];
        run.margins.logps.before = vec![Some(-1.0), None, Some(0.5)];
        run.margins.logps.after = vec![Some(1.0), None, Some(2.5)];
        run.margins.rewards.after = vec![Some(0.5), None, Some(0.25)];
        run.eval = Some(EvalFile {
            pairs: 3,
            policy: [(EVIL.to_owned(), Value::from(0.5))].into_iter().collect(),
            kl: Some(Divergence { per_token: Some(0.1), total: None }),
            choices: vec![Choices { file: EVIL.into(), questions: 3, difference: -0.01, ..Choices::default() }],
            checks: vec![EvalCheck {
                name: EVIL.into(),
                verdict: EVIL.into(),
                why: EVIL.into(),
                ..EvalCheck::default()
            }],
            ..EvalFile::default()
        });
        let summary = serde_json::json!({
            "version": EVIL, "seconds": 12.5, "steps": 100, "num_tokens": 1000, "model": EVIL,
            "data": {"train": {"facts": {"rows": 3, "shapes": [EVIL]}, "dropped": {EVIL: 3}}},
            "hashes": {EVIL: EVIL},
        });
        run.summary = summary;
        run
    }

    /// Nothing that models, data or judges wrote becomes markup, and nothing is fetched.
    #[test]
    fn what_strangers_wrote_stays_text_and_the_page_loads_nothing() {
        let html = render(&full()).expect("rendered");
        for bad in ["<script", "<img", "onerror=\"", "<link", "@import", "url(", "href=", "http:", "https:", "NaN"] {
            assert!(!html.contains(bad), "{bad}");
        }
        assert_eq!(html.matches("src=").count(), html.matches("img src=x onerror=").count());
        assert!(html.contains("{{ 7 * 7 }}") && html.contains("&lt;script&gt;"));
        assert!(html.contains("content=\"default-src 'none';"));
        assert!(html.trim_end().ends_with("</html>"));
        assert!(html.matches("<svg").count() >= 9, "{}", html.matches("<svg").count());
        assert!(html.matches("<article").count() <= 201, "judged samples are capped");
        assert!(html.contains("Won: 150, 80 shown"));
    }

    #[test]
    fn a_win_rate_names_its_policy_and_what_is_usual() {
        let mut run = run(|_, _, value| value);
        run.win_rates = vec![WinRate { policy: "my".into(), ..win_rate(0.62, [0.57, 0.67]) }];
        let html = render(&run).expect("rendered");
        for text in ["Win rate of my against base", "57.0 to 67.0 %", "Healthy: 55 to 65 %", "<b>good</b>"] {
            assert!(html.contains(text), "{text}");
        }
        // a checkpoint's is shown, and says nothing of the run, in whatever folder it is
        run.win_rates[0].policy = "step-000050".into();
        let html = render(&run).expect("rendered");
        assert!(html.contains("Win rate of step-000050 against base") && !html.contains("Better than the base."));
        run.win_rates[0].against = "other".into();
        assert!(!render(&run).expect("rendered").contains("Healthy: 55"), "that is usual over the base");
    }

    #[test]
    fn a_win_rate_without_a_verdict_is_no_verdict() {
        let mut run = run(|_, _, value| value);
        run.win_rates = vec![win_rate(f64::NAN, [0.0, 0.0])];
        run.win_rates[0].win_rate.interval = None;
        let html = render(&run).expect("rendered");
        assert!(html.contains("<strong>No verdict.</strong>") && html.contains("— of 300 prompts"), "{html}");
        assert!(!html.contains("NaN"));
        // another judge's verdict is one
        run.win_rates.push(WinRate { judge: Judge::default(), ..win_rate(0.62, [0.57, 0.67]) });
        assert!(render(&run).expect("rendered").contains("<strong>Better than the base.</strong>"));
    }

    #[test]
    fn equal_runs_have_equal_reports() {
        assert_eq!(render(&full()).expect("rendered"), render(&full()).expect("rendered"));
    }

    #[test]
    fn the_verdict_is_that_of_the_best_evidence() {
        let verdict = |run: &Run| {
            let verdict = verdict(run, &checks(run));
            (verdict.level, verdict.headline)
        };
        let mut run = run(|_, _, value| value);
        run.summary = serde_json::json!({"data": {"eval": {"facts": {"examples": 200}}}});
        assert_eq!(verdict(&run), (Level::Good, "It learned the preference.".into()), "75 % of 200");
        run.summary["data"]["eval"]["facts"]["examples"] = 8.into();
        assert_eq!(verdict(&run), (Level::Watch, "Whether it learned the preference is not clear.".into()), "6 of 8");
        run.win_rates = vec![win_rate(0.62, [0.57, 0.67])];
        assert_eq!(verdict(&run), (Level::Good, "Better than the base.".into()));
        run.win_rates = vec![win_rate(0.42, [0.37, 0.47])];
        assert_eq!(verdict(&run), (Level::Bad, "Worse than the base.".into()));
        run.win_rates = vec![win_rate(0.52, [0.47, 0.57])];
        run.state = State::Running;
        assert_eq!(verdict(&run), (Level::Watch, "So far: no clear difference to the base.".into()));
        // neither a checkpoint's nor one against another adapter is the run's
        let other =
            WinRate { folder: "sibling-by-judge".into(), against: "sibling".into(), ..win_rate(0.1, [0.05, 0.2]) };
        let checkpoint = WinRate { folder: "step-000050-vs-base-by-judge".into(), ..win_rate(0.9, [0.8, 0.95]) };
        run.win_rates.extend([checkpoint, other]);
        assert_eq!(verdict(&run), (Level::Watch, "So far: no clear difference to the base.".into()));
        let details = || tiles(&run).into_iter().filter(|tile| tile.label == "Win rate").map(|tile| tile.detail);
        let details: Vec<String> = details().collect();
        assert_eq!(details, ["against base, 47.0 to 57.0 %, a judge", "against sibling, 5.0 to 20.0 %, a judge"]);
        run.win_rates.remove(0);
        assert_eq!(verdict(&run), (Level::Watch, "So far: whether it learned the preference is not clear.".into()));
        run.win_rates.clear();
        run.history = Default::default();
        assert_eq!(verdict(&run), (Level::Watch, "So far: nothing was held out.".into()));
    }
}
