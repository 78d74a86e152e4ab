//! Model files as a stranger may have made them: whatever is in them, nothing panics, nothing is allocated because a file
//! claims it, and an error names the file. `fixtures/hostile` holds files that are wrong by intent, and what fuzzing found
//! (`fuzz/README.md`); good files are cut and flipped besides.

mod model_files;

use std::fs;

use model_files::{fixtures, good, read};
use proptest::prelude::*;

const NAMES: [&str; 4] = ["model.safetensors", "model.gguf", "config.json", "tokenizer.json"];

#[test]
fn good_files_are_read() {
    for name in NAMES {
        assert_eq!(read(name, &good(name)), Ok(()), "{name}");
    }
}

#[test]
fn files_that_are_wrong_by_intent_are_refused_by_name() {
    for name in NAMES {
        let mut found = 0;
        for entry in fs::read_dir(fixtures().join("hostile").join(name)).expect("a folder") {
            let path = entry.expect("an entry").path();
            let error = read(name, &fs::read(&path).expect("read")).expect_err(&path.display().to_string());
            // a tokenizer may be one, and not have the tokens that the other file names
            let named = error.contains(name) || (name == "tokenizer.json" && error.contains("tokenizer_config.json"));
            assert!(named, "{}: {error}", path.display());
            found += 1;
        }
        assert!(found >= 4, "{name}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn cut_anywhere(name in prop::sample::select(&NAMES[..]), at in 0.0f64..1.0) {
        let bytes = good(name);
        let cut = (bytes.len() as f64 * at) as usize;
        // a text that loses its last line break is whole
        let blank = bytes[cut..].iter().all(u8::is_ascii_whitespace);
        prop_assert_eq!(read(name, &bytes[..cut]).is_ok(), blank, "{} of {} bytes of {}", cut, bytes.len(), name);
    }

    #[test]
    fn bits_flipped(name in prop::sample::select(&NAMES[..]), flips in prop::collection::vec((0.0f64..1.0, 0u8..8), 1..6), near in any::<bool>()) {
        let mut bytes = good(name);
        // what a file says of itself is at its beginning
        let reach = if near { bytes.len().min(2000) } else { bytes.len() };
        for (at, bit) in flips {
            let at = (reach as f64 * at) as usize;
            bytes[at] ^= 1 << bit;
        }
        if let Err(error) = read(name, &bytes) {
            let others = ["model.safetensors", "tokenizer_config.json", "no weight file has tensor"];
            prop_assert!(error.contains(name) || others.iter().any(|other| error.contains(other)), "{}", error);
        }
    }
}
