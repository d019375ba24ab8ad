// A shopping cart. Prices are in cents, taxes in basis points (1900 is 19 %).

export interface Product {
  readonly sku: string;
  readonly name: string;
  readonly priceCents: number;
  readonly taxBasisPoints: number;
}

export interface CartLine {
  readonly product: Product;
  readonly quantity: number;
}

export interface Coupon {
  readonly code: string;
  readonly percent: number;
  readonly minimumCents: number;
  /** Milliseconds since the epoch. */
  readonly validUntil: number;
}

export interface Totals {
  readonly subtotal: number;
  readonly discount: number;
  readonly tax: number;
  readonly shipping: number;
  readonly total: number;
}

const FREE_SHIPPING_FROM = 5000;
const SHIPPING_CENTS = 490;
const MAX_QUANTITY = 99;

export class Cart {
  private readonly lines = new Map<string, CartLine>();
  private coupon: Coupon | null = null;

  /** Add some of a product to what is there already, up to 99. */
  add(product: Product, quantity = 1): void {
    if (!Number.isInteger(quantity) || quantity < 1) {
      throw new RangeError(`quantity ${quantity} is not possible`);
    }
    const present = this.lines.get(product.sku)?.quantity ?? 0;
    this.lines.set(product.sku, { product, quantity: Math.min(present + quantity, MAX_QUANTITY) });
  }

  /** Set the quantity of a product that is in the cart; 0 removes it. */
  setQuantity(sku: string, quantity: number): boolean {
    const line = this.lines.get(sku);
    if (line === undefined || !Number.isInteger(quantity) || quantity < 0) {
      return false;
    }
    if (quantity === 0) {
      this.lines.delete(sku);
    } else {
      this.lines.set(sku, { ...line, quantity: Math.min(quantity, MAX_QUANTITY) });
    }
    return true;
  }

  applyCoupon(coupon: Coupon, now: number = Date.now()): boolean {
    if (coupon.validUntil < now || this.subtotal() < coupon.minimumCents) {
      return false;
    }
    this.coupon = coupon;
    return true;
  }

  /** The lines, by name. */
  items(): CartLine[] {
    return [...this.lines.values()].sort((a, b) => a.product.name.localeCompare(b.product.name));
  }

  subtotal(): number {
    return this.items().reduce((sum, { product, quantity }) => sum + product.priceCents * quantity, 0);
  }

  /** All amounts of the order. The discount lowers the tax; shipping depends on what is left to pay. */
  totals(): Totals {
    const subtotal = this.subtotal();
    const percent = this.coupon !== null && subtotal >= this.coupon.minimumCents ? this.coupon.percent : 0;
    const discount = Math.round((subtotal * percent) / 100);
    const taxBeforeDiscount = this.items().reduce(
      (sum, { product, quantity }) => sum + (product.priceCents * quantity * product.taxBasisPoints) / 10000,
      0,
    );
    const tax = Math.round((taxBeforeDiscount * (100 - percent)) / 100);
    const goods = subtotal - discount + tax;
    const shipping = this.lines.size === 0 || goods >= FREE_SHIPPING_FROM ? 0 : SHIPPING_CENTS;
    return { subtotal, discount, tax, shipping, total: goods + shipping };
  }

  /** For local storage. */
  toJSON(): { lines: CartLine[]; coupon: Coupon | null } {
    return { lines: this.items(), coupon: this.coupon };
  }
}
