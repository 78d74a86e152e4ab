//! Single tokens as text and bytes, and ids without a conversation around them.

use tokenizers::DecoderWrapper;

use super::DataError;
use super::codec::Codec;

impl Codec {
    /// Ids of a text as it stands; `special` puts the BOS first where the tokenizer does.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn tokenize(&self, text: &str, special: bool) -> Result<Vec<u32>, DataError> {
        let ids = if special { self.encode(text) } else { self.encode_bare(text) };
        ids.map_err(|bad| DataError::Prompt(bad.detail))
    }

    /// The bytes that a token stands for in the middle of a text; a special token's are its name.
    #[must_use]
    pub fn piece(&self, id: u32) -> Vec<u8> {
        if let Some(added) = self.tokenizer.get_added_vocabulary().get_added_tokens_decoder().get(&id) {
            return added.content.clone().into_bytes();
        }
        let Some(piece) = self.tokenizer.id_to_token(id) else { return Vec::new() };
        if self.tokenizer.get_decoder().is_some_and(is_byte_level) {
            let bytes: Option<Vec<u8>> = piece.chars().map(byte_of).collect();
            return bytes.unwrap_or_else(|| piece.into_bytes());
        }
        // SentencePiece: a byte that no other token has, or a text whose spaces are visible
        let hex = piece.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')).filter(|hex| hex.len() == 2);
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => vec![byte],
            None => piece.replace('▁', " ").into_bytes(),
        }
    }

    /// Whether [`Codec::decode`] leaves a token out.
    #[must_use]
    pub fn is_special(&self, id: u32) -> bool {
        let added = self.tokenizer.get_added_vocabulary().get_added_tokens_decoder();
        added.get(&id).is_some_and(|token| token.special)
    }

    /// Texts of the tokens that have a name: `bos_token`, `eos_token`, `unk_token`, `pad_token`.
    #[must_use]
    pub fn named_tokens(&self) -> [(&'static str, Option<String>); 4] {
        let ids = self.special_ids();
        let text = |id: Option<u32>| self.token(id?);
        [
            ("bos_token", text(ids.bos)),
            ("eos_token", text(Some(self.eos()))),
            ("unk_token", text(ids.unknown)),
            ("pad_token", text(ids.padding)),
        ]
    }
}

fn is_byte_level(decoder: &DecoderWrapper) -> bool {
    match decoder {
        DecoderWrapper::ByteLevel(_) => true,
        DecoderWrapper::Sequence(sequence) => sequence.get_decoders().iter().any(is_byte_level),
        _ => false,
    }
}

/// The byte that GPT-2's visible alphabet writes as `c`: those that can be seen as themselves, the others in their order
/// from U+0100 on.
fn byte_of(c: char) -> Option<u8> {
    const SEEN: [std::ops::RangeInclusive<u32>; 3] = [0x21..=0x7e, 0xa1..=0xac, 0xae..=0xff];
    let c = u32::from(c);
    let byte = match c {
        _ if SEEN.iter().any(|seen| seen.contains(&c)) => c,
        0x100..=0x120 => c - 0x100,
        0x121..=0x142 => c - 0x121 + 0x7f,
        0x143 => 0xad,
        _ => return None,
    };
    u8::try_from(byte).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_visible_alphabet_is_that_of_the_tokenizers() {
        // every byte has one character, and none has two
        let mut seen = [false; 256];
        for c in (0..=0x143).filter_map(char::from_u32) {
            if let Some(byte) = byte_of(c) {
                assert!(!std::mem::replace(&mut seen[byte as usize], true), "{c}");
            }
        }
        assert!(seen.iter().all(|&seen| seen));
        assert_eq!(
            [byte_of('Ġ'), byte_of('Ċ'), byte_of('a'), byte_of('€')],
            [Some(b' '), Some(b'\n'), Some(b'a'), None]
        );
    }
}
