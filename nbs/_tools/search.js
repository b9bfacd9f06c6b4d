// Search of the built site, appended to Fuse, which finds what only resembles the query: entries that have its words come first.
// Among these: what has the query for its heading, then by `kind` (see docs.py), then by where the words stand and how often
(() => {
  const Fuzzy = window.Fuse
  const also = {gray: 'grey', grayscale: 'grey', greyscale: 'grey', color: 'colour', custom: 'own', multi: 'several', multiple: 'several',
                tabular: 'tables', vit: 'transformers', spurious: 'shortcut', faq: 'questions', my: 'your', dataset: 'data', datasets: 'data'}
  const small = new Set('a an and are can do does for how i in is it mean of on the there to use what why with'.split(' '))   // of a question
  const split = s => s.replace(/([a-z])([A-Z])/g, '$1 $2')
  const word = w => w.replace(/[\\^$.*+?()[\]{}|/]/g, '\\$&')   // no more than these: "\-" is an error in a pattern with the flag u
  const begins = w => new RegExp(`(?<![\\p{L}])${word(w)}`, 'giu')         // "ratio", "ratios" and "plot_ratio", but not "iteration"
  const whole = w => new RegExp(`(?<![\\p{L}])${word(w)}(?![\\p{L}])`, 'iu')
  const argument = w => new RegExp(`[(|,\\s]${word(w)}:\\S`, 'iu')                          // in a signature: "ratio:float=1.0"
  const heading = e => `${e.section || e.title} ${split(e.section || e.title)}`
  const one = (e, w) => {
    const n = (`${heading(e)} ${e.text}`.match(begins(w)) || []).length
    if (!n) return 0
    const head = whole(w).test(heading(e)) ? 5 : begins(w).test(heading(e)) ? 4 : 0
    return head + (argument(w).test(e.text) ? 2 : 0) + n/(n+1) + whole(w).test(e.text)/2
  }
  const points = (e, w) => Math.max(one(e, w), also[w] ? one(e, also[w]) : 0)
  const is = (e, q) => {
    const h = (e.section || e.title).toLowerCase()
    return h == q || h.startsWith(`${q}:`) ? 2 : h.endsWith(`.${q}`) ? 1 : 0
  }
  window.Fuse = class {
    constructor(entries, opts) { this.entries = entries; this.fuzzy = new Fuzzy(entries, opts) }
    search(query, opts) {
      const q = query.toLowerCase().trim(), all_words = q.replace(/\?$/, '').split(/\s+/)
      const large = all_words.filter(w => !small.has(w)), words = large.length ? large : all_words
      const rank = item => {
        const each = words.map(w => points(item, w)), named = words.every(w => whole(w).test(heading(item)))
        const said = words.every(w => [w, also[w] || w].some(o => whole(o).test(`${heading(item)} ${item.text}`)))   // "cli", not only "client"
        return {item, missing: each.filter(p => !p).length, order: [-is(item, q), -said, item.kind-named, -each.reduce((a, b) => a+b)]}
      }
      const all = this.entries.map(rank), least = Math.min(...all.map(h => h.missing))   // where none has all words, those with most
      const hits = least < words.length ? all.filter(h => h.missing == least) : []
      hits.sort((a, b) => a.order.map((o, i) => o-b.order[i]).find(Boolean) || 0)
      return (hits.length ? hits : this.fuzzy.search(query, opts)).slice(0, opts.limit)
    }
  }
})()
