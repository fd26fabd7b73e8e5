(** Shared vocabulary

    Vectors are columns, so that [W *m u] is the usual matrix-vector product.
    Everything here is plain linear algebra: [R] is a commutative ring, and an
    ordered field only where a norm or a sign is needed.  No limits, no axioms.

    Used by the files about matrices:
      x ⊙ y             elementwise product of two vectors
      dot x y, sqn x    inner product and squared Euclidean norm
      in_colspan v A    every column of v is a combination of the columns of A *)
From mathcomp Require Import all_ssreflect all_algebra.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(** * Inequalities

    MathComp renamed these between versions 1 and 2.  They are stated once here,
    so that the proofs read the same under both. *)

Section Order.
Variable R : numDomainType.
Implicit Types a b c e : R.

(** a <= b and c <= e give a + c <= b + e. *)
Lemma le_add a b c e : a <= b -> c <= e -> a + c <= b + e.
Proof.
by move=> ab ce; rewrite -subr_ge0 opprD addrACA addr_ge0 // subr_ge0.
Qed.

(** c + a <= c + b exactly when a <= b. *)
Lemma le_add2l c a b : (c + a <= c + b) = (a <= b).
Proof. by rewrite -[LHS]subr_ge0 opprD addrACA subrr add0r subr_ge0. Qed.

(** a <= a + b exactly when b >= 0. *)
Lemma le_addl a b : (a <= a + b) = (0 <= b).
Proof. by rewrite -[LHS]subr_ge0 addrC addKr. Qed.

(** a <= b + a exactly when b >= 0. *)
Lemma le_addr a b : (a <= b + a) = (0 <= b).
Proof. by rewrite addrC le_addl. Qed.

(** - a <= - b exactly when b <= a. *)
Lemma le_opp a b : (- a <= - b) = (b <= a).
Proof. by rewrite -[LHS]subr_ge0 opprK addrC subr_ge0. Qed.

(** c >= 0 and a <= b give c a <= c b. *)
Lemma le_mul2l c a b : 0 <= c -> a <= b -> c * a <= c * b.
Proof. by move=> c0 ab; rewrite -subr_ge0 -mulrBr mulr_ge0 // subr_ge0. Qed.

(** c >= 0 and a <= b give a c <= b c. *)
Lemma le_mul2r c a b : 0 <= c -> a <= b -> a * c <= b * c.
Proof. by rewrite ![_ * c]mulrC; exact: le_mul2l. Qed.

(** 0 <= a <= b and 0 <= c <= e give a c <= b e. *)
Lemma le_mul a b c e : 0 <= a -> 0 <= c -> a <= b -> c <= e -> a * c <= b * e.
Proof.
move=> a0 c0 ab ce; apply: le_trans (le_mul2l a0 ce) (le_mul2r _ ab).
exact: le_trans ce.
Qed.

(** c <= 1 and a >= 0 give c a <= a. *)
Lemma le_shrink c a : c <= 1 -> 0 <= a -> c * a <= a.
Proof. by move=> c1 a0; have := le_mul2r a0 c1; rewrite mul1r. Qed.

(** Triangle inequality: |x + y| <= |x| + |y|. *)
Lemma le_normD (V : normedZmodType R) (x y : V) : `|x + y| <= `|x| + `|y|.
Proof.
have := ler_norm_sum (index_enum _) (fun i : 'I_2 => if i == 0 then x else y) xpredT.
by rewrite !big_ord_recl !big_ord0 /= !addr0.
Qed.
End Order.

(** * Elementwise product *)

Section Hadamard.
Variable R : comRingType.

(** (x ⊙ y)_i = x_i y_i *)
Definition had n (x y : 'cV[R]_n) : 'cV[R]_n := \col_i (x i 0 * y i 0).
End Hadamard.

Notation "x ⊙ y" := (had x y) (at level 40, left associativity) : ring_scope.

Section HadamardTheory.
Variables (R : comRingType) (n : nat).
Implicit Types (x y z : 'cV[R]_n) (c : R).

(** (x ⊙ y)_i = x_i y_i *)
Lemma hadE x y i : (x ⊙ y) i 0 = x i 0 * y i 0.
Proof. by rewrite mxE. Qed.

(** x ⊙ (y + z) = x ⊙ y + x ⊙ z *)
Lemma hadDr x y z : x ⊙ (y + z) = x ⊙ y + x ⊙ z.
Proof. by apply/colP=> i; rewrite !mxE mulrDr. Qed.

(** (x + y) ⊙ z = x ⊙ z + y ⊙ z *)
Lemma hadDl x y z : (x + y) ⊙ z = x ⊙ z + y ⊙ z.
Proof. by apply/colP=> i; rewrite !mxE mulrDl. Qed.

(** x ⊙ (W u) = (diag(x) W) u: multiplying the output by x scales the rows of W. *)
Lemma had_mulmx m (W : 'M[R]_(n, m)) x u :
  x ⊙ (W *m u) = (diag_mx x^T *m W) *m u.
Proof.
apply/colP=> i; rewrite -mulmxA mul_diag_mx !mxE.
by congr (_ * _); apply: eq_bigr => j _; rewrite mxE.
Qed.
End HadamardTheory.

(** * Inner product and squared norm *)

Section Dot.
Variables (R : realFieldType) (n : nat).
Implicit Types x y z : 'cV[R]_n.

(** <x, y> = x^T y *)
Definition dot x y : R := (x^T *m y) 0 0.

(** ||x||^2 = <x, x> *)
Definition sqn x : R := dot x x.

(** <x, y> = sum_i x_i y_i *)
Lemma dotE x y : dot x y = \sum_i x i 0 * y i 0.
Proof. by rewrite /dot mxE; apply: eq_bigr => i _; rewrite mxE. Qed.

(** <x, y> = <y, x> *)
Lemma dotC x y : dot x y = dot y x.
Proof. by rewrite !dotE; apply: eq_bigr => i _; rewrite mulrC. Qed.

(** ||x||^2 >= 0 *)
Lemma sqn_ge0 x : 0 <= sqn x.
Proof. by rewrite /sqn dotE sumr_ge0 // => i _; rewrite -expr2 sqr_ge0. Qed.

(** ||x||^2 = 0 exactly when x = 0. *)
Lemma sqn_eq0 x : (sqn x == 0) = (x == 0).
Proof.
apply/eqP/eqP => [|->]; last first.
  by rewrite /sqn dotE big1 // => i _; rewrite mxE mul0r.
rewrite /sqn dotE => /eqP; rewrite psumr_eq0 => [|i _]; last first.
  by rewrite -expr2 sqr_ge0.
by move=> /allP s0; apply/colP=> i; apply/eqP;
   have := s0 i (mem_index_enum i); rewrite mulf_eq0 orbb mxE.
Qed.

(** <x + y, z> = <x, z> + <y, z> *)
Lemma dotDl x y z : dot (x + y) z = dot x z + dot y z.
Proof. by rewrite /dot linearD mulmxDl mxE. Qed.

(** Pythagoras: <x, y> = 0 gives ||x + y||^2 = ||x||^2 + ||y||^2. *)
Lemma sqnD_orth x y : dot x y = 0 -> sqn (x + y) = sqn x + sqn y.
Proof.
move=> xy0; rewrite /sqn dotDl !(dotC _ (x + y)) !dotDl xy0 (dotC y) xy0.
by rewrite add0r addr0.
Qed.
End Dot.

(** * Column space *)

(** The columns of v lie in the span of the columns of A.  MathComp compares row
    spaces, hence the transposes; [colspanP] gives the familiar reading. *)
Definition in_colspan (F : fieldType) m n p (v : 'M[F]_(m, p)) (A : 'M[F]_(m, n)) :=
  (v^T <= A^T)%MS.

(** v lies in col(A) exactly when v = A x for some x. *)
Lemma colspanP (F : fieldType) m n p (v : 'M[F]_(m, p)) (A : 'M[F]_(m, n)) :
  reflect (exists x : 'M[F]_(n, p), v = A *m x) (in_colspan v A).
Proof.
apply: (iffP submxP) => [[D vD]|[x ->]].
  by exists D^T; apply: trmx_inj; rewrite trmx_mul trmxK.
by exists x^T; rewrite trmx_mul.
Qed.

(** Two matrices that act alike on every vector are equal. *)
Lemma mulmx_inj (R : comRingType) m n (A B : 'M[R]_(m, n)) :
  (forall u : 'cV_n, A *m u = B *m u) -> A = B.
Proof.
move=> E; apply/matrixP=> i j.
have := congr1 (fun v : 'cV_m => v i 0) (E (delta_mx j 0)).
by rewrite -!colE !mxE.
Qed.
