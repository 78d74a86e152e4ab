//! "Did you mean", and what there is to mean.

/// The known name nearest to `written`, if one is near enough to be meant.
pub(crate) fn did_you_mean<'k>(written: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    /// What is longer is no name that was mistyped; the distance takes time and memory by its length.
    const LONGEST: usize = 80;
    if written.len() > LONGEST {
        return None;
    }
    known
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(written, name), name))
        .filter(|(distance, name)| *distance <= (written.len().max(name.len()) / 3).max(1))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

/// Names in words, a long list cut short.
pub(crate) fn list(names: &[String]) -> String {
    const SHOWN: usize = 20;
    let shown: Vec<String> = names.iter().take(SHOWN).map(|name| format!("`{name}`")).collect();
    let rest = names.len().saturating_sub(SHOWN);
    let more = if rest > 0 { format!(" and {rest} more") } else { String::new() };
    format!("{}{more}", shown.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names_are_suggested_and_far_ones_are_not() {
        let known = ["learning_rate", "beta", "batch_size"];
        assert_eq!(did_you_mean("learnig_rate", known), Some("learning_rate"));
        assert_eq!(did_you_mean("bta", known), Some("beta"));
        assert_eq!(did_you_mean("model", known), None);
        // as long as a request may be: nothing is computed
        let (long, longer) = ("a".repeat(80), "a".repeat(81));
        assert_eq!(did_you_mean(&long, [&long[..]]), Some(&long[..]));
        assert_eq!(did_you_mean(&longer, [&longer[..]]), None);
        assert_eq!(did_you_mean(&"beta".repeat(2 << 20), known), None);
    }
}
