//! What an image is called, where nothing about it is out of the ordinary.
//!
//! The problem: who an image belongs to and what its file is called has to be known of each, and nearly each has
//! plain values. [`ordinary`] tells it of those at once. Of any other it tells nothing, and whoever asks has a closer
//! look: at character sets, missing values and the errors that they deserve.

use crate::error::Result;
use crate::scan::Header;

const SOP_CLASS_UID: u32 = 0x0008_0016;
const SOP_INSTANCE_UID: u32 = 0x0008_0018;
const MODALITY: u32 = 0x0008_0060;
const PATIENT_ID: u32 = 0x0010_0020;
const INSTANCE_NUMBER: u32 = 0x0020_0013;
/// Longer modalities are cut in the name of a file.
const MOST_MODALITY: usize = 16;
const MOST_DIGITS: usize = 12;

/// Who an ordinary image belongs to, and what its file is called.
#[derive(Debug, PartialEq, Eq)]
pub struct Ordinary {
    /// The value that groups images into a case.
    pub identifier: String,
    /// `Image_<modality>_<instance number>`
    pub stem: String,
}

/// Whether a text is a UID (PS3.5 section 9.1): numbers with dots between them, at most 64 characters.
///
/// Leading zeros are accepted, since objects in the field have them.
#[must_use]
pub fn is_uid(text: &str) -> bool {
    let is_number = |one: &str| !one.is_empty() && one.bytes().all(|byte| byte.is_ascii_digit());
    text.len() <= 64 && text.split('.').all(is_number)
}

/// The names of an image that is what its sender said it is, with plain values; None for any other.
///
/// `whole` are the bytes that were scanned, where the header does not hold them; `tag` is that of the identifier.
///
/// # Errors
/// As [`Header::value`].
pub fn ordinary(
    header: &Header,
    whole: Option<&[u8]>,
    sop_class_uid: &str,
    sop_instance_uid: &str,
    tag: u32,
) -> Result<Option<Ordinary>> {
    for (tag, said) in [
        (SOP_INSTANCE_UID, sop_instance_uid),
        (SOP_CLASS_UID, sop_class_uid),
    ] {
        match header.value(tag, whole)? {
            Some((_, value)) if trimmed(&value) == said.as_bytes() => {}
            _ => return Ok(None),
        }
    }
    let Some((entry, value)) = header.value(tag, whole)? else {
        return Ok(None);
    };
    let is_text = match entry.vr() {
        "LO" | "SH" => true,
        "" => tag == PATIENT_ID,
        _ => false,
    };
    let Some(identifier) = Some(trimmed(&value)).filter(|one| is_text && is_plain_text(one)) else {
        return Ok(None);
    };
    let Some((_, value)) = header.value(MODALITY, whole)? else {
        return Ok(None);
    };
    let modality = trimmed(&value);
    let modality = &modality[..modality.len().min(MOST_MODALITY)];
    let Some((_, value)) = header.value(INSTANCE_NUMBER, whole)? else {
        return Ok(None);
    };
    let Some(number) = number(trimmed(&value)).filter(|_| is_plain_name(modality)) else {
        return Ok(None);
    };
    Ok(Some(Ordinary {
        identifier: text(identifier),
        stem: format!("Image_{}_{number}", text(modality)),
    }))
}

fn text(plain: &[u8]) -> String {
    String::from_utf8_lossy(plain).into_owned()
}

/// Without padding.
fn trimmed(mut value: &[u8]) -> &[u8] {
    while let [b' ' | 0, rest @ ..] | [rest @ .., b' ' | 0] = value {
        value = rest;
    }
    value
}

/// Text that is the same in every character set of DICOM: in some of them a backslash or a tilde is not.
fn is_plain_text(value: &[u8]) -> bool {
    !value.is_empty()
        && value
            .iter()
            .all(|one| matches!(one, b' '..=b'}') && *one != b'\\')
}

/// What is one part of a path as it is.
fn is_plain_name(value: &[u8]) -> bool {
    !value.starts_with(b".")
        && !value.is_empty()
        && value
            .iter()
            .all(|one| one.is_ascii_alphanumeric() || b"_.-".contains(one))
}

fn number(value: &[u8]) -> Option<i64> {
    let digits = match value {
        [b'+' | b'-', rest @ ..] => rest,
        rest => rest,
    };
    let fits = (1..=MOST_DIGITS).contains(&digits.len());
    let is_number = fits && digits.iter().all(u8::is_ascii_digit);
    let text = std::str::from_utf8(value).ok().filter(|_| is_number)?;
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scan::scan;
    use crate::source::Source;

    const EXPLICIT: &str = "1.2.840.10008.1.2.1";

    fn element(tag: u32, vr: &[u8; 2], value: &[u8]) -> Vec<u8> {
        let mut padded = value.to_vec();
        if padded.len() % 2 == 1 {
            padded.push(if vr == b"UI" { 0 } else { b' ' });
        }
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&u16::try_from(tag >> 16).unwrap().to_le_bytes());
        bytes.extend_from_slice(&u16::try_from(tag & 0xFFFF).unwrap().to_le_bytes());
        bytes.extend_from_slice(vr);
        bytes.extend_from_slice(&u16::try_from(padded.len()).unwrap().to_le_bytes());
        bytes.extend(padded);
        bytes
    }

    fn names_of(modality: &[u8], patient: &[u8], vr: &[u8; 2], number: &[u8]) -> Option<Ordinary> {
        let dataset = [
            element(SOP_CLASS_UID, b"UI", b"1.2.3"),
            element(SOP_INSTANCE_UID, b"UI", b"1.2.4"),
            element(MODALITY, b"CS", modality),
            element(PATIENT_ID, vr, patient),
            element(INSTANCE_NUMBER, b"IS", number),
        ]
        .concat();
        let header = scan(Source::Bytes(&dataset), Some(EXPLICIT)).unwrap();
        assert_eq!(
            ordinary(&header, Some(&dataset), "1.2.3", "1.2.5", PATIENT_ID).unwrap(),
            None
        );
        assert_eq!(
            ordinary(&header, Some(&dataset), "1.2", "1.2.4", PATIENT_ID).unwrap(),
            None
        );
        ordinary(&header, Some(&dataset), "1.2.3", "1.2.4", PATIENT_ID).unwrap()
    }

    #[test]
    fn an_ordinary_image_has_its_names() {
        let expected = |identifier: &str, stem: &str| {
            Some(Ordinary {
                identifier: identifier.to_owned(),
                stem: stem.to_owned(),
            })
        };
        assert_eq!(
            names_of(b"CT", b"A 1", b"LO", b"+07 "),
            expected("A 1", "Image_CT_7")
        );
        assert_eq!(
            names_of(b"ABCDEFGHIJKLMNOPQ", b" A", b"SH", b"-0"),
            expected("A", "Image_ABCDEFGHIJKLMNOP_0")
        );
    }

    #[test]
    fn of_any_other_nothing_is_told() {
        for modality in [&b""[..], b"..", b"C/T", b"C\xE4", b"A B"] {
            assert_eq!(names_of(modality, b"A", b"LO", b"1"), None);
        }
        for patient in [&b""[..], b"A\\B", b"A~", b"A\x1B", b"\xE4", b"A\n", b"  "] {
            assert_eq!(names_of(b"CT", patient, b"LO", b"1"), None);
        }
        assert_eq!(names_of(b"CT", b"A", b"UI", b"1"), None);
        for number in [
            &b""[..],
            b"1\\2",
            b"1234567890123",
            b"+",
            b"1.0",
            b"0x1",
            b"1 2",
        ] {
            assert_eq!(names_of(b"CT", b"A", b"LO", number), None);
        }
    }

    #[test]
    fn a_uid_is_numbers_with_dots_between_them() {
        for one in ["1", "1.2", "0.01", &"1".repeat(64)] {
            assert!(is_uid(one), "{one}");
        }
        for one in [
            "",
            ".",
            "1.",
            ".1",
            "1..2",
            "1.a",
            "1.2 ",
            "\u{0661}",
            &"1".repeat(65),
        ] {
            assert!(!is_uid(one), "{one}");
        }
    }
}
