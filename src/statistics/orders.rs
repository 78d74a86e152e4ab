//! Does a judge say the same when the answers trade places?

use serde::Serialize;

use super::Outcome;

/// Verdicts of both orders on the same prompts, from the policy's view.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Orders {
    /// Prompts by how the order with the policy first came out (row) and the other one (column): win, loss, tie.
    pub table: [[usize; 3]; 3],
    /// Share of prompts on which both agree.
    pub agreement: f64,
    /// Cohen's κ of the table: agreement beyond chance; none where chance alone agrees always.
    pub kappa: Option<f64>,
    /// Share of prompts with a win in one order and a loss in the other.
    pub flip_rate: f64,
    /// Share of decisive verdicts for what stood first, `(W₁. + L.₂) / decisive`; ½ without position bias, none where every
    /// verdict is a tie.
    pub first_slot_share: Option<f64>,
}

impl Orders {
    /// Of the outcomes of both orders for each prompt; none of no prompts.
    #[must_use]
    pub fn of(outcomes: impl IntoIterator<Item = [Outcome; 2]>) -> Option<Self> {
        let mut table = [[0; 3]; 3];
        for [first, second] in outcomes {
            table[first.place()][second.place()] += 1;
        }
        Self::of_table(table)
    }

    /// Of a table as [`table`](Self::table) has it; none where it is empty.
    #[must_use]
    pub fn of_table(table: [[usize; 3]; 3]) -> Option<Self> {
        let n = table.iter().flatten().sum::<usize>() as f64;
        if n == 0.0 {
            return None;
        }
        let row = |i: usize| table[i].iter().sum::<usize>();
        let column = |j: usize| table.iter().map(|row| row[j]).sum::<usize>();
        let decisive = row(0) + row(1) + column(0) + column(1);
        Some(Self {
            table,
            agreement: (0..3).map(|i| table[i][i]).sum::<usize>() as f64 / n,
            kappa: kappa(&table),
            flip_rate: (table[0][1] + table[1][0]) as f64 / n,
            // the policy is first in the rows and second in the columns, where its loss is a win of the first slot
            first_slot_share: (decisive > 0).then(|| (row(0) + column(1)) as f64 / decisive as f64),
        })
    }

    /// What a reader has to know before trusting the verdicts, if anything: first-slot share outside 0.4 to 0.6, agreement
    /// below 0.6.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if let Some(share) = self.first_slot_share.filter(|share| (share - 0.5).abs() > 0.1) {
            let place = if share > 0.5 { "first" } else { "second" };
            warnings.push(format!(
                "the judge prefers what stands {place}: the first answer wins {:.0} % of its decisive verdicts",
                100.0 * share
            ));
        }
        if self.agreement < 0.6 {
            warnings.push(format!(
                "the judge agrees with itself on {:.0} % of the prompts when the answers trade places",
                100.0 * self.agreement
            ));
        }
        warnings
    }
}

/// Cohen's κ of a square table of counts: `(p_o − p_e) / (1 − p_e)`, with `p_o` the share on the diagonal and `p_e` what
/// the margins would put there by chance (Cohen 1960). None of nothing, or where `p_e` is 1.
#[must_use]
pub fn kappa<const N: usize>(table: &[[usize; N]; N]) -> Option<f64> {
    let n = table.iter().flatten().sum::<usize>() as f64;
    let observed = (0..N).map(|i| table[i][i]).sum::<usize>() as f64 / n;
    let expected = (0..N)
        .map(|i| table[i].iter().sum::<usize>() as f64 * table.iter().map(|row| row[i]).sum::<usize>() as f64)
        .sum::<f64>()
        / (n * n);
    (n > 0.0 && expected < 1.0).then(|| (observed - expected) / (1.0 - expected))
}
