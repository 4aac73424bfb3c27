//! What a Part 10 object has before its dataset (PS3.10 section 7.1).

/// Who wrote the file meta information: pydicom, by which readers know these objects.
const IMPLEMENTATION: &str = "1.2.826.0.1.3680043.8.498.1";
const VERSION: &str = "DICOMNODE";
/// Most characters of an AE title.
const TITLE: usize = 16;

/// Preamble, `DICM` and File Meta Information for a dataset that came without them; an empty `title` is
/// left out. What is not ASCII becomes a question mark.
#[must_use]
pub fn prefix(sop_class_uid: &str, sop_instance_uid: &str, syntax: &str, title: &str) -> Vec<u8> {
    let mut body = Vec::with_capacity(256);
    body.extend_from_slice(b"\x02\x00\x01\x00OB\x00\x00\x02\x00\x00\x00\x00\x01");
    element(&mut body, 0x02, *b"UI", sop_class_uid, 0);
    element(&mut body, 0x03, *b"UI", sop_instance_uid, 0);
    element(&mut body, 0x10, *b"UI", syntax, 0);
    element(&mut body, 0x12, *b"UI", IMPLEMENTATION, 0);
    element(&mut body, 0x13, *b"SH", VERSION, b' ');
    if !title.is_empty() {
        let title: String = title.chars().take(TITLE).collect();
        element(&mut body, 0x16, *b"AE", &title, b' ');
    }
    let mut whole = vec![0; 128];
    whole.extend_from_slice(b"DICM\x02\x00\x00\x00UL\x04\x00");
    whole.extend_from_slice(&u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes());
    whole.extend_from_slice(&body);
    whole
}

/// An element of group 0002; a value without end is cut to what its length can tell.
fn element(into: &mut Vec<u8>, number: u16, vr: [u8; 2], value: &str, pad: u8) {
    let mut value: Vec<u8> = value
        .chars()
        .map(|one| u8::try_from(one).ok().filter(u8::is_ascii).unwrap_or(b'?'))
        .take(usize::from(u16::MAX - 1))
        .collect();
    if !value.len().is_multiple_of(2) {
        value.push(pad);
    }
    into.extend_from_slice(&[2, 0]);
    into.extend_from_slice(&number.to_le_bytes());
    into.extend_from_slice(&vr);
    into.extend_from_slice(&u16::try_from(value.len()).unwrap_or(u16::MAX).to_le_bytes());
    into.extend_from_slice(&value);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_padded_and_told() {
        let made = prefix("1.2", "1.2.34", "1.2.840.10008.1.2.1", "NODE\u{e9}");
        assert_eq!(&made[128..132], b"DICM");
        let length = u32::from_le_bytes(made[140..144].try_into().unwrap());
        assert_eq!(made.len(), 144 + length as usize);
        let text = |what: &[u8]| made.windows(what.len()).any(|one| one == what);
        assert!(text(b"\x02\x00\x02\x00UI\x04\x001.2\0"));
        assert!(text(b"\x02\x00\x03\x00UI\x06\x001.2.34"));
        assert!(text(b"\x02\x00\x16\x00AE\x06\x00NODE? "));
        let without = prefix("1.2", "1.2.34", "1.2.840.10008.1.2.1", "");
        assert_eq!(made.len() - without.len(), 14);
        assert!(without.len().is_multiple_of(2));
    }

    #[test]
    fn what_is_too_long_is_cut() {
        let made = prefix(&"1".repeat(100_000), "1.2", "1.2", &"A".repeat(99));
        assert!(made.len() < 66_000);
        assert!(made.ends_with(&[b'A'; TITLE]));
    }
}
