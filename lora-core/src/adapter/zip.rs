//! The container of `torch.save`: a ZIP archive whose members are stored as they are.

use std::{
    collections::BTreeMap,
    io::{Read, Seek, SeekFrom},
};

/// The place of a member's bytes in the file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Member {
    pub start: u64,
    pub len: u64,
}

const END: [u8; 4] = *b"PK\x05\x06";
const END_64: [u8; 4] = *b"PK\x06\x06";
const LOCATOR_64: [u8; 4] = *b"PK\x06\x07";
const CENTRAL: [u8; 4] = *b"PK\x01\x02";
const LOCAL: [u8; 4] = *b"PK\x03\x04";

/// A central directory longer than this is no adapter's.
const LONGEST: u64 = 100_000_000;

/// Reads the members of an archive of `len` bytes, by name.
pub(super) fn members(
    from: &mut (impl Read + Seek + ?Sized),
    len: u64,
) -> Result<BTreeMap<String, Member>, String> {
    let (start, size) = directory(from, len)?;
    if size > LONGEST || start.checked_add(size).is_none_or(|end| end > len) {
        return Err("is no archive of torch.save: its directory lies outside of the file".into());
    }
    let directory = read(from, start, size)?;
    let mut rest = Bytes(&directory);
    let mut members = BTreeMap::new();
    while !rest.0.is_empty() {
        let (name, member) = member(&mut rest).ok_or("the archive's directory is broken")??;
        let header = read(from, member.start, 30)
            .map_err(|_| format!("`{name}` lies outside of the file"))?;
        let mut local = Bytes(&header);
        let signature = local.take(4) == Some(&LOCAL);
        local.take(22);
        let (Some(name_len), Some(extra_len), true) = (local.u16(), local.u16(), signature) else {
            return Err(format!(
                "`{name}` is not where the archive's directory says"
            ));
        };
        let start = member.start + 30 + u64::from(name_len) + u64::from(extra_len);
        if start.checked_add(member.len).is_none_or(|end| end > len) {
            return Err(format!("`{name}` is truncated"));
        }
        let member = Member { start, ..member };
        if members.insert(name.clone(), member).is_some() {
            return Err(format!("`{name}` stands in the archive twice"));
        }
    }
    Ok(members)
}

/// The place and size of the central directory.
fn directory(from: &mut (impl Read + Seek + ?Sized), len: u64) -> Result<(u64, u64), String> {
    // The record at the end is followed by a comment of at most 64 KiB.
    let tail_start = len.saturating_sub(22 + 0xFFFF);
    let tail = read(from, tail_start, len - tail_start)?;
    let at = (0..tail.len().saturating_sub(21))
        .rev()
        .find(|&at| tail[at..].starts_with(&END))
        .ok_or("is no archive of torch.save, or truncated: it has no directory")?;
    let broken = "the archive's last record is broken";
    let mut end = Bytes(&tail[at..]);
    end.take(12);
    let size = end.u32().ok_or(broken)?;
    let start = end.u32().ok_or(broken)?;
    // torch writes the large form as well, in which each number has eight bytes.
    let locator = tail_start + at as u64;
    if locator >= 20 {
        let bytes = read(from, locator - 20, 20)?;
        let mut locator = Bytes(&bytes);
        if locator.take(4) == Some(&LOCATOR_64) {
            locator.take(4);
            let place = locator.u64().ok_or(broken)?;
            if place.checked_add(56).is_none_or(|end| end > len) {
                return Err(broken.into());
            }
            let bytes = read(from, place, 56)?;
            let mut end = Bytes(&bytes);
            if end.take(4) != Some(&END_64) {
                return Err(broken.into());
            }
            end.take(36);
            let size = end.u64().ok_or(broken)?;
            let start = end.u64().ok_or(broken)?;
            return Ok((start, size));
        }
    }
    Ok((start.into(), size.into()))
}

/// The next entry of the directory: its name, and where its local header begins.
fn member(rest: &mut Bytes) -> Option<Result<(String, Member), String>> {
    if rest.take(4)? != CENTRAL {
        return None;
    }
    rest.take(4)?;
    let (flags, method) = (rest.u16()?, rest.u16()?);
    rest.take(8)?;
    let (packed, size) = (u64::from(rest.u32()?), u64::from(rest.u32()?));
    let (name, extra, comment) = (rest.u16()?, rest.u16()?, rest.u16()?);
    rest.take(8)?;
    let start = u64::from(rest.u32()?);
    let name = String::from_utf8_lossy(rest.take(name.into())?).into_owned();
    let mut extra = Bytes(rest.take(extra.into())?);
    rest.take(comment.into())?;

    const LARGE: u64 = u32::MAX as u64;
    let mut numbers = [size, packed, start];
    while let (Some(kind), Some(len)) = (extra.u16(), extra.u16()) {
        let mut field = Bytes(extra.take(len.into())?);
        if kind == 1 {
            for number in numbers.iter_mut().filter(|number| **number == LARGE) {
                *number = field.u64()?;
            }
        }
    }
    let [size, packed, start] = numbers;
    let reason = if flags & 1 != 0 {
        "is encrypted"
    } else if method != 0 || packed != size {
        "is compressed, which torch.save never does"
    } else {
        return Some(Ok((name, Member { start, len: size })));
    };
    Some(Err(format!("`{name}` {reason}")))
}

/// Reads `len` bytes from `start` on; the caller has compared both with the file's length.
pub(super) fn read(
    from: &mut (impl Read + Seek + ?Sized),
    start: u64,
    len: u64,
) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; usize::try_from(len).map_err(|_| "is larger than memory")?];
    from.seek(SeekFrom::Start(start))
        .and_then(|_| from.read_exact(&mut bytes))
        .map_err(|error| format!("can't be read: {error}"))?;
    Ok(bytes)
}

/// Little-endian numbers off a slice.
pub(super) struct Bytes<'a>(pub &'a [u8]);

impl<'a> Bytes<'a> {
    pub fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    pub fn u16(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes(self.take(2)?.try_into().ok()?))
    }

    pub fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    pub fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }
}
