// Search of the built site, appended to Fuse, which finds what only resembles the query: entries that have its words come first.
// Among these: what has the query for its heading, then by `kind` (see docs.py), then by where the words stand and how often
(() => {
  const Fuzzy = window.Fuse
  const split = s => s.replace(/([a-z])([A-Z])/g, '$1 $2')
  const word = w => w.replace(/[^\p{L}\d_]/gu, '\\$&')
  const begins = w => new RegExp(`(?<![\\p{L}])${word(w)}`, 'giu')         // "ratio", "ratios" and "plot_ratio", but not "iteration"
  const argument = w => new RegExp(`[(|,\\s]${word(w)}:\\S`, 'iu')                          // in a signature: "ratio:float=1.0"
  const heading = e => e.section || e.title
  const points = (e, w) => {
    const head = heading(e), n = (`${head} ${split(head)} ${e.text}`.match(begins(w)) || []).length
    if (!n) return 0
    return (begins(w).test(`${head} ${split(head)}`) ? 4 : 0) + (argument(w).test(e.text) ? 2 : 0) + n/(n+1)
  }
  const is = (e, q) => { const h = heading(e).toLowerCase(); return h == q || h.endsWith(`.${q}`) }
  window.Fuse = class {
    constructor(entries, opts) { this.entries = entries; this.fuzzy = new Fuzzy(entries, opts) }
    search(query, opts) {
      const q = query.toLowerCase().trim(), words = q.split(/\s+/)
      const rank = item => ({item, each: words.map(w => points(item, w))})
      const hits = this.entries.map(rank).filter(h => h.each.every(Boolean))
      const order = h => [!is(h.item, q), h.item.kind, -h.each.reduce((a, b) => a+b)]
      hits.forEach(h => { h.order = order(h) })
      hits.sort((a, b) => a.order[0]-b.order[0] || a.order[1]-b.order[1] || a.order[2]-b.order[2])
      return (hits.length ? hits : this.fuzzy.search(query, opts)).slice(0, opts.limit)
    }
  }
})()
