//! The pickle of `torch.save`, as data.
//!
//! A pickle is a program. This interpreter knows the instructions that a dict of tensors needs
//! and the names that torch gives to tensors; every other instruction or name is an error that
//! names it. Nothing is ever called.

use std::{collections::HashMap, rc::Rc};

use candle_core::DType;

use super::{entry::MAX_AXES, zip::Bytes};

/// A tensor as the pickle describes it: a view of a storage.
#[derive(Clone, Debug)]
pub(super) struct View {
    pub storage: Rc<Storage>,
    /// All in elements.
    pub offset: usize,
    pub shape: Vec<usize>,
    pub strides: Vec<usize>,
}

/// The member of the archive in which numbers lie.
#[derive(Debug)]
pub(super) struct Storage {
    pub key: String,
    pub dtype: DType,
    /// How many numbers it has.
    pub len: usize,
}

/// A value takes many times the byte of the instruction that makes it.
const MOST_VALUES: usize = 1 << 20;

/// Values nested deeper than this are no state dict's.
const DEEPEST: usize = 16;

/// Reads a dict of tensors; names that stand there twice are kept for the caller to report.
pub(super) fn tensors(pickle: &[u8]) -> Result<Vec<(String, View)>, String> {
    let mut machine = Machine {
        code: Bytes(pickle),
        stack: Vec::new(),
        memo: HashMap::new(),
    };
    let entries = match machine.run()? {
        Value::Dict(entries) => entries,
        other => return Err(format!("the pickle holds {}, not a dict", other.kind())),
    };
    let mut tensors = Vec::new();
    for (name, value) in entries {
        match (name, value) {
            (Value::Text(name), Value::Tensor(view)) => {
                tensors.push((name.to_string(), Rc::unwrap_or_clone(view)));
            }
            (name, value) => {
                return Err(format!(
                    "the pickle's dict maps {} to {}; only names and tensors are read",
                    name.kind(),
                    value.kind()
                ));
            }
        }
    }
    Ok(tensors)
}

/// What the instructions make. Texts, tuples, names and tensors are shared, never copied.
#[derive(Clone, Debug)]
enum Value {
    Mark,
    None,
    Bool,
    Int(i64),
    Float,
    Text(Rc<str>),
    Tuple(Rc<[Value]>, usize),
    List(Vec<Value>, usize),
    Dict(Vec<(Value, Value)>),
    Name(Name),
    Storage(Rc<Storage>),
    Tensor(Rc<View>),
    /// A dict or list that the memo was asked for: those change, so sharing them is refused.
    Shared,
}

/// The names that a tensor's pickle may refer to.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Name {
    RebuildTensor,
    RebuildParameter,
    OrderedDict,
    Storage(DType),
}

impl Name {
    fn of(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("torch._utils", "_rebuild_tensor_v2") => Self::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Self::RebuildParameter,
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch", storage) => Self::Storage(match storage {
                "DoubleStorage" => DType::F64,
                "FloatStorage" => DType::F32,
                "HalfStorage" => DType::F16,
                "BFloat16Storage" => DType::BF16,
                "LongStorage" => DType::I64,
                "IntStorage" => DType::I32,
                "ShortStorage" => DType::I16,
                "ByteStorage" => DType::U8,
                _ => return None,
            }),
            _ => return None,
        })
    }
}

impl Value {
    fn kind(&self) -> &'static str {
        match self {
            Self::Mark => "a mark",
            Self::None => "None",
            Self::Bool => "a bool",
            Self::Int(_) => "a number",
            Self::Float => "a float",
            Self::Text(_) => "a text",
            Self::Tuple(..) => "a tuple",
            Self::List(..) => "a list",
            Self::Dict(_) => "a dict",
            Self::Name(_) => "a name",
            Self::Storage(_) => "a storage",
            Self::Tensor(_) => "a tensor",
            Self::Shared => "a shared dict or list",
        }
    }

    /// How deep values nest in it.
    fn depth(&self) -> usize {
        match self {
            Self::Tuple(_, depth) | Self::List(_, depth) => *depth,
            Self::Dict(entries) => entries
                .iter()
                .map(|(_, value)| value.depth() + 1)
                .max()
                .unwrap_or(0),
            _ => 0,
        }
    }

    fn count(&self) -> Option<usize> {
        match self {
            Self::Int(value) => usize::try_from(*value).ok(),
            _ => None,
        }
    }

    fn counts(&self) -> Option<Vec<usize>> {
        match self {
            Self::Tuple(values, _) if values.len() <= MAX_AXES => {
                values.iter().map(Self::count).collect()
            }
            _ => None,
        }
    }
}

struct Machine<'a> {
    code: Bytes<'a>,
    stack: Vec<Value>,
    memo: HashMap<u32, Value>,
}

impl Machine<'_> {
    fn run(&mut self) -> Result<Value, String> {
        loop {
            if self.stack.len().max(self.memo.len()) > MOST_VALUES {
                return Err(format!(
                    "the pickle holds more than {MOST_VALUES} values at once; no state dict does"
                ));
            }
            let [code] = self.bytes()?;
            match code {
                // PROTO
                0x80 => {
                    let version = u8::from_le_bytes(self.bytes()?);
                    if version != 2 {
                        return Err(format!(
                            "the pickle has protocol {version}; torch.save writes 2"
                        ));
                    }
                }
                // STOP
                b'.' => return self.pop(),
                b'(' => self.stack.push(Value::Mark),
                b'N' => self.stack.push(Value::None),
                // NEWTRUE, NEWFALSE
                0x88 | 0x89 => self.stack.push(Value::Bool),
                // BININT, BININT1, BININT2, LONG1, BINFLOAT
                b'J' => {
                    let value = u32::from_le_bytes(self.bytes()?) as i32;
                    self.stack.push(Value::Int(value.into()));
                }
                b'K' => {
                    let value = u8::from_le_bytes(self.bytes()?);
                    self.stack.push(Value::Int(value.into()));
                }
                b'M' => {
                    let value = u16::from_le_bytes(self.bytes()?);
                    self.stack.push(Value::Int(value.into()));
                }
                0x8a => {
                    let value = self.long()?;
                    self.stack.push(Value::Int(value));
                }
                b'G' => {
                    self.bytes::<8>()?;
                    self.stack.push(Value::Float);
                }
                // BINUNICODE
                b'X' => {
                    let len = u32::from_le_bytes(self.bytes()?) as usize;
                    let text = self.code.take(len).ok_or("the pickle is truncated")?;
                    let text = std::str::from_utf8(text).map_err(|error| error.to_string())?;
                    self.stack.push(Value::Text(text.into()));
                }
                // EMPTY_TUPLE, TUPLE1, TUPLE2, TUPLE3, TUPLE
                b')' => self.tuple(0)?,
                0x85 => self.tuple(1)?,
                0x86 => self.tuple(2)?,
                0x87 => self.tuple(3)?,
                b't' => {
                    let count = self.above_mark()?;
                    self.tuple(count)?;
                    // The mark is now below the tuple.
                    let tuple = self.pop()?;
                    self.stack.pop();
                    self.stack.push(tuple);
                }
                // EMPTY_LIST, APPEND, APPENDS
                b']' => self.stack.push(Value::List(Vec::new(), 1)),
                b'a' => self.append(1)?,
                b'e' => {
                    let count = self.above_mark()?;
                    self.remove_mark(count);
                    self.append(count)?;
                }
                // EMPTY_DICT, SETITEM, SETITEMS
                b'}' => self.stack.push(Value::Dict(Vec::new())),
                b's' => self.set_items(2)?,
                b'u' => {
                    let count = self.above_mark()?;
                    self.remove_mark(count);
                    self.set_items(count)?;
                }
                // BINPUT, LONG_BINPUT, BINGET, LONG_BINGET
                b'q' => {
                    let index = u8::from_le_bytes(self.bytes()?);
                    self.put(index.into())?;
                }
                b'r' => {
                    let index = u32::from_le_bytes(self.bytes()?);
                    self.put(index)?;
                }
                b'h' => {
                    let index = u8::from_le_bytes(self.bytes()?);
                    self.get(index.into())?;
                }
                b'j' => {
                    let index = u32::from_le_bytes(self.bytes()?);
                    self.get(index)?;
                }
                // GLOBAL
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    let known = Name::of(&module, &name).ok_or_else(|| {
                        format!(
                            "the pickle refers to `{module}.{name}`, which is no tensor's; \
                             nothing of it was run"
                        )
                    })?;
                    self.stack.push(Value::Name(known));
                }
                // BINPERSID, REDUCE, BUILD
                b'Q' => self.storage()?,
                b'R' => self.reduce()?,
                b'b' => self.build()?,
                other => {
                    return Err(format!(
                        "the pickle has instruction {other:#04x}, which a dict of tensors never needs"
                    ));
                }
            }
        }
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let bytes = self.code.take(N).and_then(|bytes| bytes.try_into().ok());
        bytes.ok_or_else(|| "the pickle is truncated".to_string())
    }

    fn pop(&mut self) -> Result<Value, String> {
        match self.stack.pop() {
            Some(Value::Mark) | None => Err("the pickle takes more than it has made".into()),
            Some(value) => Ok(value),
        }
    }

    /// A number of at most eight bytes.
    fn long(&mut self) -> Result<i64, String> {
        let len = usize::from(u8::from_le_bytes(self.bytes()?));
        let bytes = self.code.take(len).ok_or("the pickle is truncated")?;
        if len > 8 {
            return Err(format!("the pickle has a number of {len} bytes"));
        }
        let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
        let mut all = [if negative { 0xFF } else { 0 }; 8];
        all[..len].copy_from_slice(bytes);
        Ok(i64::from_le_bytes(all))
    }

    fn line(&mut self) -> Result<String, String> {
        let end = self.code.0.iter().position(|&byte| byte == b'\n');
        let line = end.and_then(|end| self.code.take(end + 1));
        let line = line.ok_or("the pickle is truncated")?;
        Ok(String::from_utf8_lossy(&line[..line.len() - 1]).into_owned())
    }

    /// The number of values above the last mark.
    fn above_mark(&self) -> Result<usize, String> {
        self.stack
            .iter()
            .rev()
            .position(|value| matches!(value, Value::Mark))
            .ok_or_else(|| "the pickle lacks a mark".to_string())
    }

    fn remove_mark(&mut self, above: usize) {
        self.stack.remove(self.stack.len() - above - 1);
    }

    /// Takes the `count` topmost values.
    fn take(&mut self, count: usize) -> Result<Vec<Value>, String> {
        let start = self.stack.len().checked_sub(count);
        let start = start.ok_or("the pickle takes more than it has made")?;
        let values = self.stack.split_off(start);
        if values.iter().any(|value| matches!(value, Value::Mark)) {
            return Err("the pickle takes more than it has made".into());
        }
        Ok(values)
    }

    /// How deep a value is that has `values` in it.
    fn depth(values: &[Value]) -> Result<usize, String> {
        let depth = values.iter().map(Value::depth).max().unwrap_or(0) + 1;
        if depth > DEEPEST {
            return Err(format!("the pickle nests values more than {DEEPEST} deep"));
        }
        Ok(depth)
    }

    fn tuple(&mut self, count: usize) -> Result<(), String> {
        let values = self.take(count)?;
        let depth = Self::depth(&values)?;
        self.stack.push(Value::Tuple(values.into(), depth));
        Ok(())
    }

    fn append(&mut self, count: usize) -> Result<(), String> {
        let values = self.take(count)?;
        let deep = Self::depth(&values)?;
        match self.stack.last_mut() {
            Some(Value::List(list, depth)) => {
                *depth = deep.max(*depth);
                list.extend(values);
                Ok(())
            }
            _ => Err("the pickle appends to what is no list".into()),
        }
    }

    fn set_items(&mut self, count: usize) -> Result<(), String> {
        if count % 2 == 1 {
            return Err("the pickle has a key without a value".into());
        }
        let mut values = self.take(count)?.into_iter();
        let Some(Value::Dict(entries)) = self.stack.last_mut() else {
            return Err("the pickle sets an item of what is no dict".into());
        };
        while let (Some(key), Some(value)) = (values.next(), values.next()) {
            Self::depth(std::slice::from_ref(&value))?;
            entries.push((key, value));
        }
        Ok(())
    }

    fn put(&mut self, index: u32) -> Result<(), String> {
        let value = match self.stack.last() {
            None | Some(Value::Mark) => return Err("the pickle notes what it hasn't made".into()),
            Some(Value::List(..) | Value::Dict(_)) => Value::Shared,
            Some(value) => value.clone(),
        };
        self.memo.insert(index, value);
        Ok(())
    }

    fn get(&mut self, index: u32) -> Result<(), String> {
        match self.memo.get(&index) {
            None => {
                return Err(format!(
                    "the pickle asks for note {index}, which it never made"
                ));
            }
            Some(Value::Shared) => {
                return Err(
                    "the pickle shares a dict or list, which a dict of tensors doesn't".into(),
                );
            }
            Some(value) => self.stack.push(value.clone()),
        }
        Ok(())
    }

    /// `('storage', torch.FloatStorage, key, device, length)`
    fn storage(&mut self) -> Result<(), String> {
        let id = self.pop()?;
        let storage = match &id {
            Value::Tuple(id, _) => match &id[..] {
                [
                    Value::Text(kind),
                    Value::Name(Name::Storage(dtype)),
                    Value::Text(key),
                    Value::Text(_),
                    len,
                ] if **kind == *"storage" => len.count().map(|len| Storage {
                    key: key.to_string(),
                    dtype: *dtype,
                    len,
                }),
                _ => None,
            },
            _ => None,
        };
        let storage =
            storage.ok_or("the pickle refers to something that is no tensor's storage")?;
        self.stack.push(Value::Storage(storage.into()));
        Ok(())
    }

    /// The few calls that make a tensor; none of them is carried out.
    fn reduce(&mut self) -> Result<(), String> {
        let (arguments, name) = (self.pop()?, self.pop()?);
        let (Value::Tuple(arguments, _), Value::Name(name)) = (&arguments, &name) else {
            return Err(format!("the pickle calls {}", name.kind()));
        };
        let made = match (name, &arguments[..]) {
            (
                Name::RebuildTensor,
                [
                    Value::Storage(storage),
                    offset,
                    shape,
                    strides,
                    _requires_grad,
                    _hooks,
                    ..,
                ],
            ) => match (offset.count(), shape.counts(), strides.counts()) {
                (Some(offset), Some(shape), Some(strides)) if shape.len() == strides.len() => {
                    Value::Tensor(Rc::new(View {
                        storage: storage.clone(),
                        offset,
                        shape,
                        strides,
                    }))
                }
                _ => return Err("the pickle describes a tensor by no shape and strides".into()),
            },
            (Name::RebuildParameter, [Value::Tensor(view), ..]) => Value::Tensor(view.clone()),
            (Name::OrderedDict, []) => Value::Dict(Vec::new()),
            (name, _) => return Err(format!("the pickle calls {name:?} with other arguments")),
        };
        self.stack.push(made);
        Ok(())
    }

    /// The attributes of a state dict, `_metadata`, say nothing of the tensors.
    fn build(&mut self) -> Result<(), String> {
        self.pop()?;
        match self.stack.last() {
            Some(Value::Dict(_)) => Ok(()),
            _ => Err("the pickle sets attributes of what is no dict".into()),
        }
    }
}
