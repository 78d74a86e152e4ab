//! Where a model computes. In a binary without CUDA that is the CPU, and a GPU is a wrong request.

use super::{Place, stderr, unwrapped};

#[test]
fn the_device_and_its_reason_are_said_and_written() {
    let place = Place::new();
    let output = place.run(&["run", "recipe.toml", "--out", "run", "--set", "train.steps=1", "--device", "cpu"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(unwrapped(&output).contains("device cpu: asked for"), "{}", stderr(&output));
    let resolved = place.read("run/recipe.resolved.toml");
    let line = resolved.lines().find(|line| line.starts_with("device = ")).expect("there is a line");
    assert!(line.starts_with("device = \"cpu\"") && line.ends_with(": cpu: asked for"), "{line}");
}

#[test]
fn a_device_that_is_none_is_shown_in_the_recipe() {
    let place = Place::new();
    place.write("recipe.toml", format!("[run]\ndevice = \"gpu\"\n{}", place.read("recipe.toml")));
    let output = place.run(&["plan", "recipe.toml"]);
    assert_eq!(output.status.code(), Some(2));
    let text = unwrapped(&output);
    assert!(text.contains("a device is \"auto\", \"cpu\", or \"cuda:0\" and so on"), "{text}");
    let output = place.run(&["plan", "recipe.toml", "--device", "gpu"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
}

#[cfg(not(feature = "cuda"))]
#[test]
fn without_cuda_a_gpu_is_a_wrong_request_and_auto_says_why_it_is_the_cpu() {
    let place = Place::new();
    place.write("recipe.toml", format!("[run]\ndevice = \"cuda:0\"\n{}", place.read("recipe.toml")));
    for more in [&["recipe.toml"][..], &["recipe.toml", "--device", "cuda:1"]] {
        let output = place.run(&[&["run"], more].concat());
        assert_eq!(output.status.code(), Some(2));
        let text = unwrapped(&output);
        assert!(text.contains("is asked for, and this binary was built without CUDA"), "{text}");
        assert!(text.contains("scripts/cuda_build"), "{text}");
        assert_eq!(text.contains("recipe.toml:2"), more.len() == 1, "{text}");
    }
    assert!(!place.path("runs").exists(), "nothing was begun");
    let output = place.run(&["plan", "recipe.toml", "--device", "auto"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(unwrapped(&output).contains("device cpu: this binary was built without CUDA"), "{}", stderr(&output));
}
