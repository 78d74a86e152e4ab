use std::path::Path;

use miette::{GraphicalReportHandler, GraphicalTheme};

use super::*;
use crate::data::Dataset;
use crate::loss::Loss;
use crate::train::Warmup;

const GOOD: &str = r#"
[model]
source = "model"

[adapter]
rank = 8

[data]
train = "pairs.jsonl"

[loss.dpo]
beta = 0.1

[train]
learning_rate = 1e-4
"#;

fn read(text: &str, overrides: &[&str]) -> Result<Parsed, RecipeError> {
    let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
    parse("recipe.toml", text, Path::new("/recipes"), &overrides, Path::new("/here"))
}

/// As a person sees it, without colours.
fn shown(error: &RecipeError) -> String {
    let mut text = String::new();
    let handler = GraphicalReportHandler::new_themed(GraphicalTheme::unicode_nocolor()).with_width(100);
    handler.render_report(&mut text, error).expect("rendered");
    text
}

#[test]
fn mistakes_are_shown_where_they_are() {
    let cases: &[(&str, &str, &str, &[&str])] = &[
        ("a key that is not known", "rank = 8", "rnak = 8", &[]),
        ("a table that is not known", "[train]", "[trian]", &[]),
        ("a wrong type", "rank = 8", "rank = \"eight\"", &[]),
        ("a table where a number belongs", "beta = 0.1", "beta = { value = 0.1 }", &[]),
        ("a fraction where a count belongs", "rank = 8", "rank = 8.5", &[]),
        ("out of range", "beta = 0.1", "beta = 0", &[]),
        ("not positive", "learning_rate = 1e-4", "learning_rate = -1e-4", &[]),
        ("a count of zero", "rank = 8", "rank = 0", &[]),
        ("smoothing", "beta = 0.1", "label_smoothing = 0.5", &[]),
        ("dropout", "rank = 8", "dropout = 1.0", &[]),
        ("a value that is not known", "learning_rate = 1e-4", "schedule = \"linaer\"", &[]),
        ("a warm-up that is neither", "learning_rate = 1e-4", "warmup = \"some\"", &[]),
        ("a loss that is not known", "[loss.dpo]", "[loss.dop]", &[]),
        ("a key of another loss", "beta = 0.1", "reduction = \"sum\"", &[]),
        ("two losses", "[loss.dpo]", "[loss.ipo]\n[loss.dpo]", &[]),
        ("no loss", "[loss.dpo]\nbeta = 0.1", "", &[]),
        ("no table", "[data]\ntrain = \"pairs.jsonl\"", "", &[]),
        ("no key", "train = \"pairs.jsonl\"", "", &[]),
        ("no TOML", "rank = 8", "rank = = 8", &[]),
        ("a key twice", "rank = 8", "rank = 8\nrank = 16", &[]),
        ("epochs and steps", "learning_rate = 1e-4", "epochs = 1\nsteps = 10", &[]),
        ("two contradictions", "rank = 8", "rank = 8\nalpha = 16\ninit = \"adapter\"", &[]),
        ("shared prompts under dropout", "learning_rate = 1e-4", "share_prompts = true", &["adapter.dropout=0.05"]),
        ("evaluation of nothing", "[train]", "[eval]\nevery = 10\n[train]", &[]),
        ("a prompt as long as everything", "[loss.dpo]", "max_prompt_length = 1024\n[loss.dpo]", &[]),
        ("--set of an unknown key", "", "", &["adapter.rnak=8"]),
        ("--set of a wrong type", "", "", &["train.shuffle=3", "adapter.rank=4"]),
        ("--set out of range", "", "", &["adapter.rank=4", "loss.dpo.beta=-1"]),
        ("--set without a value", "", "", &["adapter.rank"]),
        ("--set without a section", "", "", &["rank=8"]),
    ];
    let mut all = String::new();
    for (name, from, to, overrides) in cases {
        assert!(GOOD.contains(from), "{name}");
        let text = if from.is_empty() { GOOD.to_owned() } else { GOOD.replacen(from, to, 1) };
        let error = read(&text, overrides).expect_err(name);
        all.push_str(&format!("# {name}\n{}\n", shown(&error)));
    }
    insta::assert_snapshot!(all);
}

#[test]
fn a_recipe_is_read_with_its_defaults() {
    let parsed = read(GOOD, &[]).expect("read");
    let recipe = &parsed.recipe;
    assert_eq!(recipe.train.batch_size.get(), 32);
    assert_eq!(recipe.train.warmup, Warmup::Share(0.1));
    assert!(matches!(&recipe.loss, Loss::Dpo(dpo) if dpo.beta.get() == 0.1));
    assert_eq!(parsed.origin("adapter.rank"), Origin::Recipe);
    assert_eq!(parsed.origin("train.batch_size"), Origin::Default);
}

#[test]
fn paths_belong_to_the_recipe_and_those_of_set_to_the_working_directory() {
    let parsed = read(GOOD, &["data.eval=held/../held/out.jsonl", "run.out=\"out\""]).expect("read");
    let mut recipe = parsed.recipe.clone();
    let paths: Vec<_> = recipe.paths().into_iter().map(|(key, path)| (key, path.display().to_string())).collect();
    assert!(paths.contains(&("model.source", "/recipes/model".into())), "{paths:?}");
    assert!(paths.contains(&("data.train", "/recipes/pairs.jsonl".into())), "{paths:?}");
    assert!(paths.contains(&("data.eval", "/here/held/out.jsonl".into())), "{paths:?}");
    assert!(paths.contains(&("run.out", "/here/out".into())), "{paths:?}");
    assert_eq!(parsed.origin("data.eval"), Origin::Set);
}

#[test]
fn set_takes_the_place_of_what_it_contradicts() {
    let text = GOOD.replace("learning_rate = 1e-4", "epochs = 3");
    let parsed = read(&text, &["train.steps=7", "loss.ipo.beta=0.3", "adapter.targets=[\"q_proj\"]"]).expect("read");
    assert_eq!(parsed.recipe.train.epochs, None);
    assert_eq!(parsed.recipe.train.steps.map(Count::get), Some(7));
    assert_eq!(parsed.recipe.loss.name(), "ipo");
    assert_eq!(parsed.recipe.loss.beta(), Some(0.3));
}

/// A hundred examples an epoch and a tiny model; `dropout` may come from `init`.
fn resolve(parsed: &Parsed, free: Option<usize>, dropout: f64) -> Result<Resolved, RecipeError> {
    let decoder = crate::model::family::read_config(Path::new("tests/fixtures/golden/gqa")).expect("a model");
    let lora = crate::adapter::LoraConfig { dropout, ..parsed.recipe.adapter.lora() };
    let train = Dataset::of(&[(&[1, 2, 3], &[4, 5], &[6, 7, 8])]);
    Resolved::new(
        parsed,
        &Inputs {
            out: Path::new("/runs/a"),
            epoch_examples: 100,
            commit: None,
            decoder: &decoder,
            lora: &lora,
            ranks: &[8; 14],
            train: &train,
            eval: None,
            tokenizer: 1 << 20,
            free,
            device: "cpu: asked for",
            on_gpu: false,
        },
    )
}

#[test]
fn the_resolved_recipe_is_a_recipe_that_says_the_same() {
    let parsed = read(GOOD, &["train.warmup=3", "train.steps=40"]).expect("read");
    let resolved = resolve(&parsed, None, 0.0).expect("resolved");
    assert_eq!((resolved.plan.steps, resolved.plan.warmup), (40, 3));
    let text = resolved.toml(&parsed).expect("written");
    assert!(text.contains("# --set: 3 of 40 updates"), "{text}");
    assert!(text.contains("# default: twice the rank"), "{text}");
    let again = read(&text, &[]).expect("read");
    assert_eq!(again.recipe, resolved.recipe);
    insta::assert_snapshot!(text);
}

#[test]
fn a_warm_up_longer_than_the_run_is_refused() {
    let parsed = read(GOOD, &["train.warmup=30", "train.steps=10"]).expect("read");
    let error = resolve(&parsed, None, 0.0).expect_err("refused");
    assert!(error.to_string().contains("longer than the run of 10"), "{error}");
}

#[test]
fn prompts_are_shared_unless_there_is_dropout_and_why_not_is_said() {
    let parsed = read(GOOD, &[]).expect("read");
    let resolved = resolve(&parsed, None, 0.0).expect("resolved");
    assert_eq!((resolved.plan.share_prompts, resolved.recipe.train.share_prompts), (true, Some(true)));
    let resolved = resolve(&parsed, None, 0.05);
    let resolved = resolved.expect("resolved");
    assert!(!resolved.plan.share_prompts);
    let text = resolved.toml(&parsed).expect("written");
    assert!(text.contains("# default: with dropout 0.05 each completion"), "{text}");
    let parsed = read(GOOD, &["train.share_prompts=true"]).expect("read");
    let error = resolve(&parsed, None, 0.05).expect_err("refused");
    assert!(error.to_string().contains("prompts cannot be shared under dropout"), "{error}");
}

#[test]
fn the_page_on_recipes_has_every_key() {
    let page = include_str!("../../docs/recipe.md");
    let everything = r#"
        run = { out = "o", checkpoint_every = 1 }
        model = { source = "m" }
        adapter = { rank = 1, alpha = 1, rslora = true, dora = true, dropout = 0, targets = "all-linear", init = "i",
            init_mode = "stack", init_weights = "pissa", layers = [0], rank_pattern = {}, alpha_pattern = {} }
        data = { train = "t", eval = "e", max_prompt_length = 1, chat_template = "c", columns = { prompt = "p" } }
        loss = { dpo = {} }
        train = { epochs = 1, steps = 1, memory = "1GiB", micro_batch_tokens = 1, share_prompts = true }
        eval = { every = 1 }
    "#;
    let recipe: Recipe = toml::from_str(everything).expect("read");
    let tables = toml::Table::try_from(&recipe).expect("written");
    let loss = |name: &str| toml::from_str::<Recipe>(&everything.replace("dpo", name)).expect("a loss").loss;
    for name in ["dpo", "ipo", "kto", "orpo", "sft"] {
        let table = toml::Table::try_from(loss(name)).expect("written");
        for key in table[name].as_table().expect("a table").keys() {
            assert!(page.contains(&format!("`{key}`")), "[loss.{name}] {key}");
        }
        assert!(page.contains(&format!("`[loss.{name}]`")), "{name}");
    }
    for (name, table) in tables.iter().filter(|(name, _)| *name != "loss") {
        let section = page.split(&format!("## `[{name}]`")).nth(1).unwrap_or_else(|| panic!("[{name}]"));
        let section = section.split("\n## ").next().expect("a part");
        for key in table.as_table().expect("a table").keys() {
            assert!(section.contains(&format!("`{key}`")), "[{name}] {key}");
        }
    }
}
